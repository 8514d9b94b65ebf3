"""How the hidden states of a row become one vector: one function per pooling that a contract can name.

Shapes: B rows of one batch, W their padded width, K slots, D hidden size. Rows are padded on the right. Everything is
summed in float32, also where the model runs in less: a vector of unit length is one to seven digits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llara.templates import Pooling

Pool = Callable[[Tensor, Tensor, Sequence[int]], Tensor]
"""Takes states [B, W, D], int64 [B] with one past the last token of each row, and its slots, B of them; gives float32
[B, D]."""


def slot_states(states: Tensor, ends: Tensor, count: int) -> Tensor:
    """Returns the hidden states at the `count` positions before `ends` (int64 [B]), [B, count, D]."""
    positions = (ends[:, None] - count + torch.arange(count, device=states.device)).clamp(min=0)
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def real_tokens(ends: Tensor, width: int) -> Tensor:
    """Returns which positions are no padding, bool [B, W]."""
    return torch.arange(width, device=ends.device) < ends[:, None]


def mean_of_slots(states: Tensor, ends: Tensor, counts: Sequence[int]) -> Tensor:
    """The mean over the slots, which end a row; see `Pool`."""
    most = max(counts)
    slots = torch.tensor(counts, device=states.device)[:, None]
    is_slot = torch.arange(most, device=states.device) >= most - slots  # [B, most]
    weights = is_slot.float() / slots
    return (slot_states(states, ends, most).float() * weights[..., None]).sum(dim=1)


def first_token(states: Tensor, ends: Tensor, counts: Sequence[int]) -> Tensor:
    """The state of the first token, which is [CLS] or what the tokenizer has in its place; see `Pool`."""
    return states[:, 0].float()


def mean_of_tokens(states: Tensor, ends: Tensor, counts: Sequence[int]) -> Tensor:
    """The mean over all tokens, special ones and prompts included, padding left out; see `Pool`."""
    # Where, and not times zero: what stands at padding may be no number.
    real = real_tokens(ends, states.shape[1])[..., None]
    return torch.where(real, states.float(), 0.0).sum(dim=1) / ends[:, None]


POOLS: dict[Pooling, Pool] = {"mean_of_slots": mean_of_slots, "cls": first_token, "mean": mean_of_tokens}
