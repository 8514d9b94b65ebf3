import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llara.losses.contrast import InfoNCE, info_nce
from tests.losses.helpers import unit
from tests.reference import losses as slow

Q, P = 4, 12
POSITIVES = torch.tensor([0, 3, 6, 9])


def some_excluded() -> Tensor:
    excluded = torch.rand(Q, P, generator=torch.Generator().manual_seed(9)) < 0.4
    excluded[0] = True  # every passage, its positive too
    excluded[1] = False
    return excluded.nonzero().T


LEFT_OUT: list[dict[str, Any]] = [
    {},
    {"excluded": some_excluded()},
    {"margin": 0.0},
    {"margin": 0.3},
    {"relative_margin": 0.05},
    {"excluded": some_excluded(), "margin": 0.1, "relative_margin": 0.5},
]


@pytest.mark.parametrize("cells", [1, 2 * P, 2**20])  # one query at a time, two, all
@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("left_out", LEFT_OUT, ids=lambda value: "+".join(value) or "nothing")
def test_loss_and_gradients_equal_the_slow_twin(cells: int, temperature: float, left_out: dict[str, Any]) -> None:
    queries, passages = unit(Q, 0), unit(P, 1)
    found = info_nce(queries, passages, POSITIVES, temperature, **left_out, cells=cells)
    gradients = torch.autograd.grad(found, [queries, passages], allow_unused=True)
    exact = [queries.detach().double().requires_grad_(), passages.detach().double().requires_grad_()]
    if "excluded" in left_out:
        pairs = {(query, passage) for query, passage in left_out["excluded"].T.tolist()}
        left_out = {**left_out, "excluded": pairs}
    expected = slow.info_nce(*exact, POSITIVES.tolist(), temperature, **left_out)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for left, right in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert bool(left.isfinite().all())
        assert float((left - right).norm() / right.norm().clamp(min=1.0)) < 1e-4


def test_gradients_in_float64() -> None:
    vectors = unit(Q, 0, torch.float64), unit(P, 1, torch.float64)
    excluded = some_excluded()

    def loss(queries: Tensor, passages: Tensor) -> Tensor:
        return info_nce(queries, passages, POSITIVES, 0.1, excluded, 0.3, cells=2 * P)

    assert torch.autograd.gradcheck(loss, vectors)


def test_temperature_is_applied() -> None:
    queries, passages = torch.eye(2), torch.eye(2)
    for temperature in (0.01, 0.5, 1.0, 2.0):
        expected = 2 * math.log1p(math.exp(-1 / temperature))
        assert info_nce(queries, passages, torch.tensor([0, 1]), temperature).item() == pytest.approx(
            expected, rel=1e-5
        )


def test_excluded_passages_neither_count_nor_get_gradients() -> None:
    queries, passages = unit(1, 0), unit(3, 1)
    excluded = torch.tensor([[0], [1]])
    found = info_nce(queries, passages, torch.tensor([0]), 0.1, excluded)
    (gradient,) = torch.autograd.grad(found, [passages])
    assert found.item() == pytest.approx(info_nce(queries, passages[[0, 2]], torch.tensor([0]), 0.1).item())
    assert [bool(row.any()) for row in gradient] == [True, False, True]


def test_query_whose_only_candidate_is_its_positive_has_no_loss() -> None:
    queries, passages = unit(1, 0), unit(3, 1)
    found = info_nce(queries, passages, torch.tensor([1]), 0.01, torch.tensor([[0, 0, 0], [0, 1, 2]]))
    assert found.item() == 0


def cosines(*values: float) -> tuple[Tensor, Tensor]:
    """One query, and passages with these cosines to it."""
    passages = torch.tensor([[value, math.sqrt(1 - value * value)] for value in values])
    return torch.tensor([[1.0, 0.0]]), passages


@pytest.mark.parametrize(
    ("positive", "settings", "kept"),
    [
        (0.8, {}, [0.8, 0.9, 0.77, 0.7, 0.1]),
        (0.8, {"margin": 0.0}, [0.8, 0.77, 0.7, 0.1]),  # only what scores above the positive itself
        (0.8, {"margin": 0.05}, [0.8, 0.7, 0.1]),
        (0.8, {"relative_margin": 0.05}, [0.8, 0.7, 0.1]),  # above 0.76
        (0.8, {"margin": 0.05, "relative_margin": 0.2}, [0.8, 0.1]),  # either is enough
        (-0.5, {"relative_margin": 0.2}, [-0.5]),  # the limit, -0.6, lies below the positive all the same
    ],
)
def test_margins_leave_out_what_scores_too_well(positive: float, settings: dict[str, float], kept: list[float]) -> None:
    queries, passages = cosines(positive, 0.9, 0.77, 0.7, 0.1)
    found = info_nce(queries, passages, torch.tensor([0]), 0.5, **settings)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(info_nce(*cosines(*kept), torch.tensor([0]), 0.5).item(), abs=1e-5)


def test_what_is_given_is_left_as_it_was() -> None:
    queries, passages, excluded = unit(Q, 0), unit(P, 1), some_excluded()
    before = queries.detach().clone(), passages.detach().clone(), excluded.clone()
    info_nce(queries, passages, POSITIVES, 0.1, excluded, 0.2)
    assert all(torch.equal(left, right) for left, right in zip((queries, passages, excluded), before, strict=True))


def test_bfloat16_vectors_are_scored_in_float32() -> None:
    queries, passages = unit(Q, 0).detach().bfloat16().float(), unit(P, 1).detach().bfloat16().float()
    found = InfoNCE(POSITIVES, 0.01)(queries.bfloat16(), passages.bfloat16(), slice(0, Q))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(info_nce(queries, passages, POSITIVES, 0.01).item(), rel=1e-6)
