"""The contrastive objective of fine-tuning.

Shapes: Q queries, P passages (every query's positive and hard negatives), D dimensions, R queries at a time, E pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llara.losses.rows import CELLS, full_precision, in_rows


@dataclass(frozen=True)
class InfoNCE:
    """`-log( exp(q.p+ / t) / sum over p of exp(q.p / t) )`, with all passages of the batch as candidates.

    Sources: van den Oord et al. 2018 (arXiv 1807.03748); in-batch negatives as in DPR (Karpukhin et al. 2020, section
    3.2); candidates left out by their score relative to the positive's as in NV-Retriever (de Souza et al. 2024,
    section 3: "positive-aware" mining), here on the scores of the model in training.

    Attributes:
        positives: int64 [Q], each query's positive among the passages. It always counts.
        temperature: Scores are divided by it.
        excluded: int64 [2, E], pairs of query and passage of which the passage is no negative (copies of positives).
        margin: A candidate that scores above the positive's score minus this is taken for relevant, and left out.
        relative_margin: The same, as a share of the positive's score.
    """

    positives: Tensor
    temperature: float
    excluded: Tensor | None = None
    margin: float | None = None
    relative_margin: float | None = None

    def __call__(self, queries: Tensor, passages: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        excluded = None
        if self.excluded is not None:
            query, passage = self.excluded
            here = (query >= rows.start) & (query < rows.stop) & (self.positives[query] != passage)
            excluded = (query[here] - rows.start, passage[here])
        limits = (self.margin, self.relative_margin)
        vectors = full_precision(queries), full_precision(passages)
        rest = (self.positives[rows], self.temperature, excluded, limits)
        total: Tensor = _CrossEntropy.apply(*vectors, *rest)  # type: ignore[no-untyped-call]
        return total


class _CrossEntropy(torch.autograd.Function):
    """InfoNCE of some queries, with one matrix of scores from first to last: it becomes the gradient on the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        passages: Tensor,
        positives: Tensor,
        temperature: float,
        excluded: tuple[Tensor, Tensor] | None,
        margins: tuple[float | None, float | None],
    ) -> Tensor:
        """Returns the sum over the queries."""
        scores = queries @ passages.T
        false = likely_false(scores, positives, *margins)
        scores /= temperature
        if excluded is not None:
            scores[excluded] = float("-inf")
        if false is not None:
            scores.masked_fill_(false, float("-inf"))
        own = scores.gather(1, positives[:, None])
        highest = scores.amax(dim=1, keepdim=True)
        sums = scores.sub_(highest).exp_().sum(dim=1, keepdim=True)
        scores /= sums  # the softmax, of which the positive's share is to be 1
        scores.scatter_add_(1, positives[:, None], -torch.ones_like(own))
        scores /= temperature
        ctx.save_for_backward(queries, passages, scores)
        return (sums.log() + highest - own).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients on queries and passages."""
        queries, passages, scores = ctx.saved_tensors
        # In place: of many queries, the gradient on all passages is the largest block there is.
        found = (scores @ passages).mul_(gradients[0]), (scores.T @ queries).mul_(gradients[0])
        return *found, None, None, None, None


def likely_false(
    scores: Tensor, positives: Tensor, margin: float | None, relative_margin: float | None
) -> Tensor | None:
    """Returns which candidates score too well to be negatives, bool [R, P]; None where all are believed.

    Args:
        scores: [R, P].
        positives: int64 [R], which is never one of them.
        margin: See `InfoNCE`.
        relative_margin: See `InfoNCE`.
    """
    own = scores.gather(1, positives[:, None])
    limits = [own - margin] if margin is not None else []
    if relative_margin is not None:
        # Of its absolute value, so that the limit lies below the positive where cosines are negative, too.
        limits.append(own - relative_margin * own.abs())
    if not limits:
        return None
    return (scores > torch.cat(limits, dim=1).amin(dim=1, keepdim=True)).scatter_(1, positives[:, None], False)


def info_nce(
    queries: Tensor,
    passages: Tensor,
    positives: Tensor,
    temperature: float,
    excluded: Tensor | None = None,
    margin: float | None = None,
    relative_margin: float | None = None,
    cells: int = CELLS,
) -> Tensor:
    """Returns InfoNCE summed over the queries, a scalar in float32 (float64 where the vectors are).

    The scores are never whole in memory, forward or backward: see `in_rows`.

    Args:
        queries: [Q, D], unit length.
        passages: [P, D], unit length.
        positives: See `InfoNCE`, as the rest.
        temperature: As above.
        excluded: As above.
        margin: As above.
        relative_margin: As above.
        cells: Scores at a time.
    """
    loss = InfoNCE(positives, temperature, excluded, margin, relative_margin)
    return in_rows(loss, queries, passages, cells)


def relevant_pairs(query_keys: Tensor, relevant: Tensor, passage_keys: Tensor) -> Tensor:
    """Returns which passages of a batch hold a text that is relevant to which query, int64 [2, E], for `excluded`.

    A query that stands in a batch twice, with other positives each, has all of them.

    Args:
        query_keys: int64 [Q], numbers that stand for the queries' texts.
        relevant: int64 [R, 2], keys of a query and of a text that is relevant to it.
        passage_keys: int64 [P].
    """
    query, entry = _equal(query_keys, relevant[:, 0])
    chosen, passage = _equal(relevant[entry, 1], passage_keys)
    pairs: Tensor = torch.unique(torch.stack([query[chosen], passage]), dim=1)
    return pairs


def _equal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all pairs of places at which two int64 vectors hold the same number."""
    ordered, order = right.sort()
    first = torch.searchsorted(ordered, left)
    counts = torch.searchsorted(ordered, left, right=True) - first
    places = torch.arange(len(left), device=left.device).repeat_interleave(counts)
    ends = counts.cumsum(dim=0)
    offsets = torch.arange(len(places), device=left.device) - (ends - counts)[places]
    return places, order[first[places] + offsets]
