"""The objective of rerankers: of a query's documents, the relevant one is to have the highest score.

Shapes: L lists, one per query; K places of the longest list, the relevant document first.
"""

import torch
from torch import Tensor


def listwise_softmax(scores: Tensor, there: Tensor) -> Tensor:
    """Returns the softmax cross-entropy summed over the lists, a float32 scalar.

    `-log( exp(s+) / (exp(s+) + sum over negatives of exp(s-)) )` (Ma et al. 2023, RankLLaMA, section 3.2; ListNet's
    top-one probabilities, Cao et al. 2007, with one relevant document). A list of one document counts nothing.

    Args:
        scores: float [L, K].
        there: bool [L, K], which places hold a document; the first one of every list does.
    """
    missing = torch.finfo(torch.float32).min  # not -inf, whose gradient is no number where nothing else stands
    return -scores.float().masked_fill(~there, missing).log_softmax(dim=1)[:, 0].sum()
