from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llara.losses.adapt import language_model_loss, set_recall, slot_logits, token_set_loss
from tests.reference import losses as slow

B, D, V = 5, 8, 50
TARGETS: dict[str, list[list[int]]] = {
    "sets": [[1, 2, 3], [49], [0, 7, 8, 20, 21], [5, 6], [2]],
    "some without": [[1, 2, 3], [], [4], [], [0]],
    "last without": [[1], [2], [3], [4, 5], []],
    "none at all": [[], [], [], [], []],
    "repeated": [[3, 3, 3, 4], [1, 1], [9], [9, 9, 0], [2]],
}


def flat(targets: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    rows = [row for row, tokens in enumerate(targets) for _ in tokens]
    weights = [1 / len(tokens) for tokens in targets for _ in tokens]
    ids = [token for tokens in targets for token in tokens]
    return (
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float64),
    )


def make_head(dtype: torch.dtype) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    return weight, lambda states: 5.0 * torch.tanh(states @ weight.T / 5.0)  # with a soft-cap, as Gemma has


def make_states(slots: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, slots, D, generator=torch.Generator().manual_seed(2), dtype=dtype).requires_grad_()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_loss_and_gradients_equal_the_slow_twin(slots: int, targets: list[list[int]]) -> None:
    weight, head = make_head(torch.float32)
    states = make_states(slots, torch.float32)
    found = token_set_loss(slot_logits(states, head), *flat(targets))
    gradients = torch.autograd.grad(found, [states, weight])

    slow_weight, slow_head = make_head(torch.float64)
    with torch.no_grad():
        slow_weight.copy_(weight)
    slow_states = states.detach().double().requires_grad_()
    expected = slow.token_set_loss(slow_states, slow_head, targets)
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    if any(targets):
        for left, right in zip(gradients, torch.autograd.grad(expected, [slow_states, slow_weight]), strict=True):
            assert relative(left, right) < 1e-5
    else:
        assert found.item() == 0
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_set_loss_in_float64(targets: list[list[int]]) -> None:
    _, head = make_head(torch.float64)
    states = make_states(3, torch.float64)
    found = token_set_loss(head(states).amax(dim=1), *flat(targets))
    assert found.item() == pytest.approx(slow.token_set_loss(states, head, targets).item(), rel=1e-12, abs=1e-12)


def test_text_without_targets_adds_nothing_and_gets_no_gradient() -> None:
    _, head = make_head(torch.float32)
    states = make_states(1, torch.float32)
    token_set_loss(slot_logits(states, head), *flat(TARGETS["some without"])).backward()
    assert states.grad is not None
    assert [bool(states.grad[row].any()) for row in range(B)] == [True, False, True, False, True]


def test_loss_of_extreme_logits_stays_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [300.0, 300.0, 300.0]])
    found = token_set_loss(logits, torch.tensor([0, 1]), torch.tensor([0, 2]), torch.ones(2))
    assert found.item() == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=1e-3)


def test_slot_logits_take_the_largest_over_slots_and_are_float32() -> None:
    states = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]], dtype=torch.bfloat16)
    found = slot_logits(states, lambda each: each)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0, 3.0]]
    assert slot_logits(states[:, :1], lambda each: each).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_language_model_loss_in_chunks_equals_the_slow_twin(chunk: int) -> None:
    weight, head = make_head(torch.float32)
    states = make_states(4, torch.float32)
    labels = torch.randint(V, (B * 4,), generator=torch.Generator().manual_seed(3))
    found = language_model_loss(states.flatten(0, 1), labels, head, chunk)
    gradients = torch.autograd.grad(found, [states, weight])
    expected = slow.language_model_loss(states.flatten(0, 1), labels, head)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for left, right in zip(gradients, torch.autograd.grad(expected, [states, weight]), strict=True):
        assert relative(left, right) < 1e-5


def test_language_model_loss_never_holds_all_logits() -> None:
    seen = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return states @ torch.ones(D, V)

    states = make_states(4, torch.float32).flatten(0, 1)
    language_model_loss(states, torch.zeros(B * 4, dtype=torch.int64), head, chunk=6).backward()
    assert max(seen) == 6
    assert sum(seen) == 2 * B * 4  # once forward, once again backward


def test_language_model_loss_without_gradients_and_without_tokens() -> None:
    _, head = make_head(torch.float32)
    states = make_states(1, torch.float32).detach()[:, 0]
    labels = torch.arange(B)
    with torch.no_grad():
        assert float(language_model_loss(states, labels, head, 2)) == pytest.approx(
            float(slow.language_model_loss(states, labels, head)), rel=1e-5
        )
        assert float(language_model_loss(states[:0], labels[:0], head)) == 0
    empty = make_states(1, torch.float32)[:0, 0]
    assert language_model_loss(empty, labels[:0], head).item() == 0


def test_recall_is_the_share_of_the_set_among_as_many_likeliest() -> None:
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5], [9.0, 0, 0, 0, 0, 0], [1.0, 2, 3, 4, 5, 6]])
    rows, ids = torch.tensor([0, 0, 0, 1, 3, 3]), torch.tensor([0, 2, 5, 5, 0, 1])
    found = set_recall(logits, rows, ids)  # 2 of 3, 1 of 1, no target, 0 of 2
    assert found.tolist() == [pytest.approx(2 / 3 + 1), 3]
    assert set_recall(logits, rows[:0], ids[:0]).tolist() == [0, 0]
