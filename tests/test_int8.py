"""Linear maps in 8-bit integers, beside the slow sum they stand for."""

import pytest
import torch

from llara.errors import ModelError
from llara.int8 import Int8Linear, is_int8, quantize_linears, round_rows
from tests import tiny


def test_the_product_is_that_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    linear, states = torch.nn.Linear(24, 7).requires_grad_(False), torch.randn(2, 5, 24)
    found = Int8Linear(linear)(states)
    weights, outer = round_rows(linear.weight.detach())
    for batch in range(2):
        for place in range(5):
            rounded, inner = round_rows(states[batch, place][None])
            for output in range(7):
                total = sum(int(a) * int(b) for a, b in zip(rounded[0], weights[output], strict=True))
                expected = total * float(inner[0, 0]) * float(outer[output, 0]) + float(linear.bias[output])
                assert float(found[batch, place, output]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_it_is_near_the_float_product_and_no_row_depends_on_another() -> None:
    torch.manual_seed(1)
    linear, states = torch.nn.Linear(64, 32, bias=False), torch.randn(9, 64)
    rounded = Int8Linear(linear)
    found, exact = rounded(states), linear(states).detach()
    assert float((found - exact).norm() / exact.norm()) < 0.02
    assert float((found - exact).abs().max()) > 0
    huge = torch.cat([states, 1e4 * torch.randn(3, 64)])
    assert torch.equal(rounded(huge)[:9], found)
    assert torch.equal(torch.cat([rounded(row[None]) for row in states]), found)


def test_rows_of_zeros_stay_zeros() -> None:
    found = Int8Linear(torch.nn.Linear(8, 4, bias=False))(torch.zeros(2, 8))
    assert torch.equal(found, torch.zeros(2, 4))


def test_every_map_but_the_head_is_replaced() -> None:
    lm = tiny.model("llama").lm
    assert not is_int8(lm)
    quantize_linears(lm, "tiny", keep=lm.get_output_embeddings())
    assert is_int8(lm)
    left = [name for name, part in lm.named_modules() if type(part) is torch.nn.Linear]
    assert left == ["lm_head"]


def test_a_model_without_plain_linear_maps_is_refused() -> None:
    lm = tiny.model("gpt2").lm
    with pytest.raises(
        ModelError, match=r"^gpt2: has no linear maps of the kind that can be int8; use --dtype float32"
    ):
        quantize_linears(lm, "gpt2", keep=lm.get_output_embeddings())
