import pytest
import torch
from torch import Tensor

from llara.losses.contrast import InfoNCE
from llara.losses.distill import MarginMSE
from llara.losses.matryoshka import Matryoshka
from llara.losses.rows import in_rows
from tests.losses.helpers import D, unit
from tests.reference import losses as slow

POSITIVES = [0, 2, 4]
CANDIDATES = [[0, 1], [2, 3], [4, 5]]
SCORES = [[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]]
DIMS, WEIGHTS = (D, 8, 3), (1.0, 0.5, 2.0)


@pytest.mark.parametrize("cells", [1, 10**6])
def test_contrast_equals_the_slow_twin(cells: int) -> None:
    vectors = unit(3, 0, torch.float64), unit(6, 1, torch.float64)
    found = in_rows(Matryoshka(InfoNCE(torch.tensor(POSITIVES), 0.1), DIMS, WEIGHTS), *vectors, cells)

    def plain(queries: Tensor, passages: Tensor) -> Tensor:
        return slow.info_nce(queries, passages, POSITIVES, 0.1)

    expected = slow.matryoshka(plain, *vectors, DIMS, WEIGHTS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_distillation_equals_the_slow_twin() -> None:
    vectors = unit(3, 0, torch.float64), unit(6, 1, torch.float64)
    found = in_rows(Matryoshka(MarginMSE(torch.tensor(CANDIDATES), torch.tensor(SCORES), 0.1), DIMS, WEIGHTS), *vectors)

    def plain(queries: Tensor, passages: Tensor) -> Tensor:
        return slow.margin_mse(queries, passages, CANDIDATES, SCORES, 0.1)

    expected = slow.matryoshka(plain, *vectors, DIMS, WEIGHTS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_in_float64(normalise: bool) -> None:
    loss = Matryoshka(InfoNCE(torch.tensor(POSITIVES), 0.1), DIMS, WEIGHTS, normalise)
    vectors = unit(3, 0, torch.float64), unit(6, 1, torch.float64)
    assert torch.autograd.gradcheck(lambda queries, passages: in_rows(loss, queries, passages), vectors)


def test_all_dimensions_alone_are_the_loss_itself() -> None:
    loss = InfoNCE(torch.tensor(POSITIVES), 0.1)
    queries, passages = unit(3, 0), unit(6, 1)
    everything = slice(0, 3)
    assert torch.equal(
        Matryoshka(loss, (D,), (1.0,))(queries, passages, everything), loss(queries, passages, everything)
    )


def test_only_the_dimensions_kept_get_gradients() -> None:
    queries, passages = unit(3, 0), unit(6, 1)
    Matryoshka(InfoNCE(torch.tensor(POSITIVES), 0.1), (4,), (1.0,))(queries, passages, slice(0, 3)).backward()
    assert queries.grad is not None
    assert queries.grad[:, :4].any()
    assert not queries.grad[:, 4:].any()
