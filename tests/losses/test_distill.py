import pytest
import torch
from torch import Tensor

from llara.losses.distill import KLDivergence, MarginMSE
from llara.losses.rows import in_rows
from tests.losses.helpers import unit
from tests.reference import losses as slow

Q, P = 4, 12
RAGGED = [[0, 1, 2, 3], [4, 5], [6], [7, 8, 9]]
SCORES = [[3.0, 1.0, -2.0, 3.5], [0.2, 0.1], [5.0], [-1.0, 4.0, 2.0]]


def padded(rows: list[list[float]] | list[list[int]], fill: float, dtype: torch.dtype) -> Tensor:
    most = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (most - len(row))] for row in rows], dtype=dtype)


CANDIDATES = padded(RAGGED, -1, torch.int64)
TEACHER = padded(SCORES, float("nan"), torch.float64)  # what stands where there is no candidate must not matter


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("teacher_temperature", [1.0, 2.5])
@pytest.mark.parametrize("cells", [1, 10**6])
def test_kl_equals_the_slow_twin(temperature: float, teacher_temperature: float, cells: int) -> None:
    vectors = unit(Q, 0, torch.float64), unit(P, 1, torch.float64)
    found = in_rows(KLDivergence(CANDIDATES, TEACHER, temperature, teacher_temperature), *vectors, cells)
    expected = slow.kl_divergence(*vectors, RAGGED, SCORES, temperature, teacher_temperature)
    compare(found, expected, vectors)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("cells", [1, 10**6])
def test_margin_mse_equals_the_slow_twin(temperature: float, cells: int) -> None:
    vectors = unit(Q, 0, torch.float64), unit(P, 1, torch.float64)
    found = in_rows(MarginMSE(CANDIDATES, TEACHER, temperature), *vectors, cells)
    compare(found, slow.margin_mse(*vectors, RAGGED, SCORES, temperature), vectors)


def compare(found: Tensor, expected: Tensor, vectors: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for left, right in zip(
        torch.autograd.grad(found, vectors), torch.autograd.grad(expected, vectors, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", [KLDivergence(CANDIDATES, TEACHER, 0.5), MarginMSE(CANDIDATES, TEACHER, 0.5)])
def test_gradients_in_float64(loss: KLDivergence | MarginMSE) -> None:
    vectors = unit(Q, 0, torch.float64), unit(P, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda queries, passages: in_rows(loss, queries, passages), vectors)


def test_a_student_that_scores_as_its_teacher_has_nothing_to_learn() -> None:
    queries, passages = unit(Q, 0), unit(P, 1)
    with torch.no_grad():
        teacher = torch.einsum("qd,qkd->qk", queries, passages[CANDIDATES.clamp(min=0)]) / 0.05
        for loss in (KLDivergence(CANDIDATES, teacher, 0.05), MarginMSE(CANDIDATES, teacher + 7, 0.05)):
            assert float(loss(queries, passages, slice(0, Q))) == pytest.approx(0.0, abs=1e-4)


def test_a_query_without_negatives_adds_nothing() -> None:
    alone, teacher = torch.tensor([[2]]), torch.tensor([[5.0]])
    queries, passages = unit(1, 0), unit(3, 1)
    for loss in (KLDivergence(alone, teacher, 0.1), MarginMSE(alone, teacher, 0.1)):
        found = loss(queries, passages, slice(0, 1))
        assert float(found.detach()) == 0
        assert not torch.autograd.grad(found, queries)[0].any()
