"""Matryoshka: the first dimensions of a vector alone are trained to be a good vector, too.

Shapes: P passages, D dimensions, R queries at a time.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from llara.losses.rows import RowLoss, full_precision


@dataclass(frozen=True)
class Matryoshka:
    """A weighted sum of one loss over vectors cut to their first dimensions (Kusupati et al. 2022, equation 1).

    Attributes:
        loss: The objective.
        dims: Dimensions kept, each 1 to D; D itself means the vectors as they are.
        weights: One per dimension.
        normalise: Whether a cut vector is brought back to unit length.
    """

    loss: RowLoss
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    normalise: bool = True

    def __call__(self, queries: Tensor, passages: Tensor, rows: slice) -> Tensor:
        """See `RowLoss`."""
        total = full_precision(queries).new_zeros(())
        for dim, weight in zip(self.dims, self.weights, strict=True):
            total = total + weight * self.loss(self._cut(queries, dim), self._cut(passages, dim), rows)
        return total

    def _cut(self, vectors: Tensor, dim: int) -> Tensor:
        assert 0 < dim <= vectors.shape[1], "the configuration is checked against the model"
        if dim == vectors.shape[1]:
            return vectors
        cut = full_precision(vectors[:, :dim])
        return F.normalize(cut, dim=-1) if self.normalise else cut
