"""Objectives over a whole batch of vectors, computed for some of its queries at a time.

Every query is compared with every passage, so that the scores of a batch grow with its square. They are needed only row
by row: no more than `CELLS` of them are in memory at once, forward and backward.

Shapes: Q queries, P passages (every query's positive and hard negatives), D dimensions, R queries at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CELLS = 2**20
"""Scores at a time; 4 MiB in float32."""


class RowLoss(Protocol):
    """An objective that is a sum over queries."""

    def __call__(self, queries: Tensor, passages: Tensor, rows: slice) -> Tensor:
        """Returns the sum over some queries, a scalar.

        Args:
            queries: [R, D], the vectors of these queries.
            passages: [P, D], all passages.
            rows: Which of the batch's queries they are.
        """
        ...


def row_slices(queries: int, passages: int, cells: int = CELLS) -> Iterator[slice]:
    """Yields slices of the queries, in order, of at most `cells` scores each, but of one query at least."""
    size = max(cells // max(passages, 1), 1)
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def in_rows(loss: RowLoss, queries: Tensor, passages: Tensor, cells: int = CELLS) -> Tensor:
    """Returns a loss summed over all queries, with its graph; the backward pass computes the scores once more."""
    total = queries.new_zeros((), dtype=full_precision(queries).dtype)
    for rows in row_slices(len(queries), len(passages), cells):
        part = checkpoint(loss, queries[rows], passages, rows, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total


def row_gradients(
    losses: Sequence[RowLoss], weights: Sequence[float], queries: Tensor, passages: Tensor, cells: int = CELLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each loss summed over all queries, float [losses], and the gradients of their weighted sum.

    Args:
        losses: The objectives.
        weights: One per objective.
        queries: [Q, D].
        passages: [P, D].
        cells: See `CELLS`.

    Returns:
        The sums without graph, and the gradients on queries and passages, [Q, D] and [P, D].
    """
    queries, passages = queries.detach(), passages.detach().requires_grad_()
    sums = queries.new_zeros(len(losses), dtype=full_precision(queries).dtype)
    on_queries, on_passages = torch.zeros_like(queries), torch.zeros_like(passages)
    scale = sums.new_tensor(weights)
    with torch.enable_grad():
        for rows in row_slices(len(queries), len(passages), cells):
            some = queries[rows].requires_grad_()
            parts = torch.stack([loss(some, passages, rows) for loss in losses])
            sums += parts.detach()
            found = torch.autograd.grad((parts * scale).sum(), [some, passages], allow_unused=True)
            # Where no candidate is left to be told apart, nothing depends on the vectors.
            for total, gradient in ((on_queries[rows], found[0]), (on_passages, found[1])):
                if gradient is not None:
                    total += gradient
    return sums, on_queries, on_passages


def full_precision(values: Tensor) -> Tensor:
    """Returns values in float32, or in float64 where they are: scores divided by 0.01 do not fit in less."""
    return values if values.dtype == torch.float64 else values.float()
