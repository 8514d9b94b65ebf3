"""What each position of a row may see, where two branches share a text and several texts may share a row.

Shapes: B rows, W their padded width, T a text's length (prefix included), S and N the branches' lengths.
A text with its branches is `[text | SELF | NEXT]`. A row holds one, with padding on one side, or several in a row.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["right", "left"]
TEXT, SELF, NEXT = 0, 1, 2
BLOCK = 128  # positions that FlexAttention looks at together; packed rows are a multiple of it


class Layout(NamedTuple):
    """Where each position belongs, from which follows what it sees.

    Attributes:
        documents: int64 [B, W], the text of its row; padding has numbers of its own.
        parts: int64 [B, W], 0 in a text, 1 in SELF, 2 in NEXT.
        position_ids: int64 [B, W], counted from each text's start; NEXT's start again right after the text.
    """

    documents: Tensor
    parts: Tensor
    position_ids: Tensor


class MaskForm(NamedTuple):
    """How a model takes a prepared mask; which form is right for a model, `parity` finds out.

    Attributes:
        added: Attention adds the mask to its scores, as eager attention does; else True means visible.
        window: Where the sliding window goes: into no mask, into every one, or into those of the layers that have it.
        blocks: The mask is a FlexAttention `BlockMask`.
    """

    added: bool = False
    window: Literal["nowhere", "everywhere", "by layer"] = "nowhere"
    blocks: bool = False


class BranchLayout(NamedTuple):
    """The layout of rows with one text each, and where each branch ends.

    Attributes:
        layout: See `Layout`.
        self_end: int64 [B], one past the last SELF position.
        next_end: int64 [B], one past the last NEXT position.
    """

    layout: Layout
    self_end: Tensor
    next_end: Tensor


def branch_layout(
    text_lengths: Tensor, self_length: int, next_length: int, width: int, padding: Padding = "right"
) -> BranchLayout:
    """Returns the layout under which each branch is numerically identical to running it alone.

    Args:
        text_lengths: int64 [B], tokens of prefix and text.
        self_length: Tokens of the SELF suffix, slots included.
        next_length: Tokens of the NEXT suffix, slots included.
        width: W, at least the longest row.
        padding: The side on which rows are padded.
    """
    device = text_lengths.device
    used = text_lengths + self_length + next_length
    offset = width - used if padding == "left" else torch.zeros_like(used)
    absolute = torch.arange(width, device=device)[None, :]
    column = absolute - offset[:, None]  # [B, W], 0 at the row's first token
    text = text_lengths[:, None]
    padded = (column < 0) | (column >= used[:, None])
    in_next = (column >= text + self_length) & ~padded
    parts = ((column >= text) & ~padded) * SELF + in_next * (NEXT - SELF)
    position_ids = torch.where(in_next, column - self_length, column).masked_fill(padded, 0)
    # A padded position is a text by itself: it sees itself, so that no softmax runs over an empty set.
    documents = torch.where(padded, absolute + 1, 0)
    return BranchLayout(Layout(documents, parts, position_ids), offset + text_lengths + self_length, offset + used)


def packed_layout(text_lengths: Sequence[int], self_length: int, next_length: int, multiple: int = BLOCK) -> Layout:
    """Returns the layout of one row that holds several texts with their branches one after the other, on the CPU.

    Args:
        text_lengths: Tokens of prefix and text, for each text.
        self_length: As in `branch_layout`.
        next_length: As in `branch_layout`.
        multiple: The row is padded to a multiple of so many positions.
    """
    lengths = torch.as_tensor(text_lengths)
    sizes = lengths + self_length + next_length
    total = int(sizes.sum())
    documents = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    column = torch.arange(total) - (sizes.cumsum(0) - sizes)[documents]
    text = lengths[documents]
    parts = (column >= text) * SELF + (column >= text + self_length) * (NEXT - SELF)
    position_ids = column - self_length * (parts == NEXT)
    padding = -total % multiple
    filled = [
        torch.nn.functional.pad(each, (0, padding), value=value)[None]
        for each, value in ((documents, len(lengths)), (parts, TEXT), (position_ids, 0))
    ]
    return Layout(*filled)


def visibility(layout: Layout, window: int | None = None) -> Callable[..., Tensor]:
    """Returns the rule itself, as FlexAttention takes it: (row, head, position, other) to whether it sees the other.

    Within a text causal; SELF and NEXT see the text and themselves, and never each other; texts never see each other.

    Args:
        layout: The rows.
        window: A position sees only others that are less than so many before it, by position ids.
    """
    documents, parts, position_ids = layout

    def sees(row: Tensor, head: Any, position: Tensor, other: Tensor) -> Tensor:
        part = parts[row, other]
        same = (documents[row, position] == documents[row, other]) & (other <= position)
        seen = same & ((part == TEXT) | (part == parts[row, position]))
        if window is not None:
            seen = seen & (position_ids[row, position] - position_ids[row, other] < window)
        return seen

    return sees


def dense_mask(layout: Layout, window: int | None = None) -> Tensor:
    """Returns the mask, bool [B, 1, W, W], True where position i sees position j. For SDPA: eager would *add* it."""
    count, width = layout.documents.shape
    column = torch.arange(width, device=layout.documents.device)
    row = torch.arange(count, device=column.device)[:, None, None]
    return visibility(layout, window)(row, None, column[None, :, None], column[None, None, :])[:, None]


def prepared_mask(layout: Layout, form: MaskForm, window: int | None, dtype: torch.dtype) -> Any:
    """Returns a layout's mask in the form that a model takes: a tensor, a `BlockMask`, or one per kind of layer.

    Args:
        layout: The rows.
        form: The form.
        window: The model's sliding window.
        dtype: That of the model's weights, for a mask that is added.
    """

    def make(window: int | None) -> Any:
        if form.blocks:
            return block_mask(layout, window)
        mask = dense_mask(layout, window)
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min) if form.added else mask

    if form.window == "by layer":
        return {"full_attention": make(None), "sliding_attention": make(window)}
    return make(window if form.window == "everywhere" else None)


def block_mask(layout: Layout, window: int | None = None) -> Any:
    """Returns the mask as a FlexAttention `BlockMask`, for rows of a multiple of `BLOCK` positions.

    A block of positions looks at the blocks from where the text of its first position begins, up to itself; the rule
    decides within them. So no mask of W x W is ever made.
    """
    from torch.nn.attention.flex_attention import BlockMask

    documents = layout.documents
    count, width = documents.shape
    assert width % BLOCK == 0, "packed rows are padded to whole blocks"
    blocks = width // BLOCK
    column = torch.arange(width, device=documents.device).expand(count, -1)
    starts = torch.cat([torch.ones_like(documents[:, :1]), documents.diff(dim=1)], dim=1) != 0
    begins = torch.where(starts, column, 0).cummax(dim=1).values  # where the text of each position begins
    first = begins[:, ::BLOCK] // BLOCK  # [B, blocks]
    own = torch.arange(blocks, device=documents.device)
    indices = (first[:, :, None] + own).clamp(max=blocks - 1)
    return BlockMask.from_kv_blocks(
        (own - first + 1).to(torch.int32)[:, None],
        indices.to(torch.int32)[:, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visibility(layout, window),
    )
