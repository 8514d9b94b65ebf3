import pytest
import torch
from torch import Tensor

from llara.losses.contrast import InfoNCE
from llara.losses.distill import KLDivergence
from llara.losses.rows import in_rows, row_gradients, row_slices
from tests.losses.helpers import unit

Q, P = 5, 9
POSITIVES = torch.tensor([0, 2, 4, 6, 8])
CANDIDATES = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [8, -1]])
TEACHER = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
LOSSES = (InfoNCE(POSITIVES, 0.1), KLDivergence(CANDIDATES, TEACHER, 0.1))


@pytest.mark.parametrize(("cells", "sizes"), [(1, [1] * 5), (2 * P, [2, 2, 1]), (3 * P - 1, [2, 2, 1]), (10**6, [5])])
def test_slices_cover_every_query_once_within_the_bound(cells: int, sizes: list[int]) -> None:
    slices = list(row_slices(Q, P, cells))
    assert [rows.stop - rows.start for rows in slices] == sizes
    assert [number for rows in slices for number in range(rows.start, rows.stop)] == list(range(Q))
    assert list(row_slices(0, P, cells)) == []


@pytest.mark.parametrize("cells", [1, 2 * P, 10**6])
def test_row_gradients_are_those_of_the_whole(cells: int) -> None:
    queries, passages = unit(Q, 0, torch.float64), unit(P, 1, torch.float64)
    weights = (0.7, 2.0)
    everything = slice(0, Q)
    parts = [loss(queries, passages, everything) for loss in LOSSES]
    total = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True)]).sum()
    expected = torch.autograd.grad(total, [queries, passages])
    sums, on_queries, on_passages = row_gradients(LOSSES, weights, queries, passages, cells)
    assert not sums.requires_grad
    torch.testing.assert_close(sums, torch.stack(parts).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(on_queries, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(on_passages, expected[1], rtol=1e-12, atol=1e-12)


def test_gradients_are_found_where_grad_mode_is_off() -> None:
    with torch.no_grad():
        _, on_queries, _ = row_gradients(LOSSES, (1.0, 1.0), unit(Q, 0), unit(P, 1))
    assert bool(on_queries.any())


def test_a_loss_that_does_not_depend_on_the_vectors_has_no_gradient() -> None:
    def nothing(queries: Tensor, passages: Tensor, rows: slice) -> Tensor:
        return queries.sum() * 0

    sums, on_queries, on_passages = row_gradients([nothing], (1.0,), unit(Q, 0), unit(P, 1))
    assert sums.tolist() == [0.0]
    assert not on_queries.any()
    assert not on_passages.any()


def test_no_more_scores_than_allowed_are_kept_for_the_backward_pass() -> None:
    seen: list[int] = []

    def watched(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor

    queries, passages = unit(32, 0), unit(64, 1)
    loss = InfoNCE(torch.arange(32), 0.1)
    with torch.autograd.graph.saved_tensors_hooks(watched, lambda tensor: tensor):
        in_rows(loss, queries, passages, cells=4 * 64)
    assert seen and max(seen) <= max(passages.numel(), 4 * 64)
    assert sum(size == 4 * 64 for size in seen) == 0, "scores are not kept at all"
