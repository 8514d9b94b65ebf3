"""The shared-prefix mask and position ids: two branches over one text in one forward pass.

Shapes: B texts, W the padded width of a row, T a text's length (prefix included), S and N the branches' lengths.
A row is `[text | SELF | NEXT]`, with padding on one side.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["right", "left"]


class BranchLayout(NamedTuple):
    """What a model needs to run both branches at once, and where each branch ends.

    Attributes:
        mask: bool [B, 1, W, W], True where row i may see column j. For SDPA only: eager attention would *add* it.
        position_ids: int64 [B, W]; NEXT's start again right after the text.
        self_end: int64 [B], one past the last SELF position.
        next_end: int64 [B], one past the last NEXT position.
    """

    mask: Tensor
    position_ids: Tensor
    self_end: Tensor
    next_end: Tensor


def branch_layout(
    text_lengths: Tensor, self_length: int, next_length: int, width: int, padding: Padding = "right"
) -> BranchLayout:
    """Returns the mask under which each branch is numerically identical to running it alone.

    Causal inside each part; SELF and NEXT see the text; NEXT never sees SELF; nothing sees padding. A padded position
    sees itself, so that no softmax runs over an empty set.

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
    column = torch.arange(width, device=device)[None, :] - offset[:, None]  # [B, W], 0 at the row's first token
    text = text_lengths[:, None]
    in_text = (column >= 0) & (column < text)
    in_self = (column >= text) & (column < text + self_length)
    in_next = (column >= text + self_length) & (column < used[:, None])
    part = in_self * 1 + in_next * 2 + (~(in_text | in_self | in_next)) * 3  # [B, W]: 0 text, 1 SELF, 2 NEXT, 3 padding

    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    same = part[:, :, None] == part[:, None, :]
    visible = same | in_text[:, None, :]
    itself = torch.eye(width, dtype=torch.bool, device=device)
    padded = part == 3
    mask = (visible & causal & ~padded[:, None, :] & ~padded[:, :, None]) | itself

    position_ids = torch.where(in_next, column - self_length, column).masked_fill(padded, 0)
    self_end = offset + text_lengths + self_length
    return BranchLayout(mask[:, None], position_ids, self_end, offset + used)
