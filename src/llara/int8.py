"""Linear maps in 8-bit integers: a third or less of the time that they take in float32 on a CPU with VNNI or the like.

Weights are rounded once, with a scale per output; states while they pass, with a scale per token, so that the rounding
of a row does not depend on the rows beside it. Both are symmetric, -127 to 127, as in LLM.int8() without its outliers
(Dettmers et al., NeurIPS 2022, section 2, "vector-wise quantization"); sums are integers, exact in 32 bits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llara.errors import ModelError

LARGEST = 127
# Keeps a row of zeros from being divided by zero; its integers are zeros whatever the scale.
LEAST_SCALE = 1e-12
# A sum of K products of two such integers stays below 2**31 up to here.
MOST_INPUTS = 2**31 // LARGEST**2


class Int8Linear(nn.Module):
    """A linear map whose weight is int8 with one float32 scale per output. For inference on a CPU.

    Args:
        linear: Float map with in_features up to 133,000, which is left as it is.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        assert linear.in_features <= MOST_INPUTS
        rounded, scales = round_rows(linear.weight.detach().float())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", rounded.t().contiguous())  # [in, out], as the product reads it
        self.register_buffer("scales", scales[:, 0])
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """Returns float32 [..., out] for float32 [..., in]."""
        rows = states.reshape(-1, self.in_features)
        rounded, scales = round_rows(rows)
        product = torch._int_mm(rounded, self.weight).float().mul_(scales).mul_(self.scales)
        if self.bias is not None:
            product.add_(self.bias)
        return product.view(*states.shape[:-1], self.out_features)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds float32 [n, K] to int8 [n, K]; returns them and what to multiply each row by, float32 [n, 1]."""
    scales = rows.abs().amax(dim=1, keepdim=True).div_(LARGEST).clamp_min_(LEAST_SCALE)
    return torch.div(rows, scales).round_().to(torch.int8), scales


def quantize_linears(module: Any, name: str, keep: Any = None) -> None:
    """Puts `Int8Linear` in the place of every linear map below a module, but for `keep` (the LM head).

    A norm, an embedding, or a map that is no plain `nn.Linear` stays as it is. `name` is what the user calls the model.

    Raises:
        ModelError: There is no such map; GPT-2's, for example, are of a class of their own.
    """
    places = [
        (part, place, child)
        for part in module.modules()
        for place, child in part.named_children()
        if type(child) is nn.Linear and child is not keep
    ]
    if not places:
        raise ModelError(f"{name}: has no linear maps of the kind that can be int8; use --dtype float32")
    for part, place, child in places:
        setattr(part, place, Int8Linear(child))


def is_int8(module: Any) -> bool:
    """Tells whether a module holds linear maps in 8-bit integers."""
    return any(isinstance(part, Int8Linear) for part in module.modules())
