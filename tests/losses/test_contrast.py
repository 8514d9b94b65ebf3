import math

import pytest
import torch
from torch import Tensor

from llara.losses.contrast import info_nce
from tests.reference import losses as slow

Q, P, D = 4, 12, 16


def unit(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.nn.functional.normalize(values, dim=-1).requires_grad_()


POSITIVES = torch.tensor([0, 3, 6, 9])


def some_excluded() -> Tensor:
    excluded = torch.rand(Q, P, generator=torch.Generator().manual_seed(9)) < 0.4
    excluded[0] = True  # every passage, its positive too
    excluded[1] = False
    return excluded


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("with_excluded", [False, True])
def test_loss_and_gradients_equal_the_slow_twin(temperature: float, with_excluded: bool) -> None:
    queries, passages = unit(Q, 0), unit(P, 1)
    excluded = some_excluded() if with_excluded else None
    found = info_nce(queries, passages, POSITIVES, temperature, excluded)
    gradients = torch.autograd.grad(found, [queries, passages])
    exact = [queries.detach().double().requires_grad_(), passages.detach().double().requires_grad_()]
    expected = slow.info_nce(*exact, POSITIVES.tolist(), temperature, excluded.tolist() if with_excluded else None)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for left, right in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert bool(left.isfinite().all())
        assert float((left - right).norm() / right.norm()) < 1e-4


def test_temperature_is_applied() -> None:
    queries, passages = torch.eye(2), torch.eye(2)
    for temperature in (0.01, 0.5, 1.0, 2.0):
        expected = 2 * math.log1p(math.exp(-1 / temperature))
        assert info_nce(queries, passages, torch.tensor([0, 1]), temperature).item() == pytest.approx(
            expected, rel=1e-5
        )


def test_excluded_passages_neither_count_nor_get_gradients() -> None:
    queries, passages = unit(1, 0), unit(3, 1)
    excluded = torch.tensor([[False, True, False]])
    found = info_nce(queries, passages, torch.tensor([0]), 0.1, excluded)
    (gradient,) = torch.autograd.grad(found, [passages])
    assert found.item() == pytest.approx(info_nce(queries, passages[[0, 2]], torch.tensor([0]), 0.1).item())
    assert [bool(row.any()) for row in gradient] == [True, False, True]


def test_query_whose_only_candidate_is_its_positive_has_no_loss() -> None:
    queries, passages = unit(1, 0), unit(3, 1)
    found = info_nce(queries, passages, torch.tensor([1]), 0.01, torch.ones(1, 3, dtype=torch.bool))
    assert found.item() == 0


def test_excluded_is_left_as_it_was() -> None:
    excluded = some_excluded()
    before = excluded.clone()
    info_nce(unit(Q, 0), unit(P, 1), POSITIVES, 0.1, excluded)
    assert torch.equal(excluded, before)


def test_bfloat16_vectors_are_scored_in_float32() -> None:
    queries, passages = unit(Q, 0).detach().bfloat16(), unit(P, 1).detach().bfloat16()
    found = info_nce(queries, passages, POSITIVES, 0.01)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(info_nce(queries.float(), passages.float(), POSITIVES, 0.01).item(), rel=1e-6)
