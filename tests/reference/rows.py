"""Trained rows the slow way: a copy of the whole table with the rows put in, read by the table's own module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call


def read_with_rows(table: nn.Module, ids: Sequence[int], rows: Tensor, inputs: Tensor) -> Tensor:
    """Returns what `table` gives for `inputs` once its rows `ids` are `rows` [K, D]; gradients reach `rows`."""
    weight: Tensor = table.weight  # type: ignore[assignment]
    whole = torch.stack([rows[list(ids).index(n)] if n in ids else weight[n].detach() for n in range(len(weight))])
    found: Tensor = functional_call(table, {"weight": whole}, (inputs,))
    return found
