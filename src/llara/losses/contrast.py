"""The contrastive objective of fine-tuning.

Shapes: Q queries, P passages (every query's positive and hard negatives), D dimensions.
"""

import torch
from torch import Tensor


def info_nce(
    queries: Tensor, passages: Tensor, positives: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """Returns InfoNCE summed over the queries, a float32 scalar.

    `-log( exp(q.p+ / t) / sum over p of exp(q.p / t) )`, with all passages of the batch as candidates
    (van den Oord et al. 2018, arXiv 1807.03748; in-batch negatives as in DPR, section 3.2).

    Args:
        queries: [Q, D], unit length.
        passages: [P, D], unit length.
        positives: int64 [Q], each query's positive among the passages.
        temperature: Scores are divided by it.
        excluded: bool [Q, P], passages that are no negative of a query (copies of its positives). The positive itself
            always counts.
    """
    scores = queries.float() @ passages.float().T / temperature
    if excluded is not None:
        keep_positive = torch.zeros_like(excluded).scatter_(1, positives[:, None], True)
        scores = scores.masked_fill(excluded & ~keep_positive, float("-inf"))
    return torch.nn.functional.cross_entropy(scores, positives, reduction="sum")
