"""Vectors to compute losses on."""

import torch
from torch import Tensor

D = 16


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random vectors of unit length, as a leaf of the graph."""
    values = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(values, dim=-1).requires_grad_()
