from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llara.losses.adapt import (
    language_model_loss,
    set_recall,
    slot_logits,
    token_set_loss,
    trained_leaves,
)
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
    found = token_set_loss(slot_logits([states], head)[0], *flat(targets))
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
    token_set_loss(slot_logits([states], head)[0], *flat(TARGETS["some without"])).backward()
    assert states.grad is not None
    assert [bool(states.grad[row].any()) for row in range(B)] == [True, False, True, False, True]


def test_loss_of_extreme_logits_stays_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [300.0, 300.0, 300.0]])
    found = token_set_loss(logits, torch.tensor([0, 1]), torch.tensor([0, 2]), torch.ones(2))
    assert found.item() == pytest.approx(torch.log(torch.tensor(3.0)).item(), abs=1e-3)


def test_slot_logits_take_the_largest_over_slots_and_are_float32() -> None:
    states = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]], dtype=torch.bfloat16)
    found, alone = slot_logits([states, states[:, :1]], lambda each: each)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.0, 3.0]]
    assert alone.dtype == torch.float32
    assert alone.tolist() == [[1.0, -2.0]]
    assert slot_logits([], lambda each: each) == []


def plain(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda states: states @ weight.T


WAYS = {  # head, and how the loss is computed through it
    "any head": (None, {}),
    "any head, recomputed": (None, {"recompute": True}),
    "a plain head": (plain, {}),
    "a plain head, recomputed": (plain, {"recompute": True}),
    "a plain head by its matrix": (plain, {"weight": ...}),
}
SCALES = {"as it is": None, "scaled": 0.25}


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("outer", [1.0, 3.0])
def test_language_model_loss_in_chunks_equals_the_slow_twin(
    chunk: int, way: str, dtype: torch.dtype, scale: str, outer: float
) -> None:
    weight, head = make_head(dtype)
    kind, settings = WAYS[way]
    head = kind(weight) if kind else head
    states = make_states(4, dtype)
    labels = torch.randint(V, (B * 4,), generator=torch.Generator().manual_seed(3))
    settings = {key: weight if value is ... else value for key, value in settings.items()}
    if SCALES[scale] is not None:
        settings["scale"] = torch.tensor(SCALES[scale])
    found = language_model_loss(states.flatten(0, 1), labels, head, chunk, **settings)
    gradients = torch.autograd.grad(outer * found, [states, weight])
    expected = slow.language_model_loss(states.flatten(0, 1), labels, head) * (SCALES[scale] or 1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert found.dtype == dtype
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for left, right in zip(gradients, torch.autograd.grad(outer * expected, [states, weight]), strict=True):
        assert relative(left, right) < tolerance


def test_language_model_loss_by_the_matrix_holds_for_a_real_vocabulary_and_for_extreme_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32_016, 16, generator=generator).requires_grad_()
    states = (torch.randn(24, 16, generator=generator) * torch.logspace(-2, 2, 24)[:, None]).requires_grad_()
    labels = torch.randint(32_016, (24,), generator=generator)
    found = language_model_loss(states, labels, plain(weight), 10, weight=weight)
    expected = slow.language_model_loss(states, labels, plain(weight))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = (torch.autograd.grad(each, [states, weight]) for each in (found, expected))
    for left, right in zip(*gradients, strict=True):
        assert relative(left, right) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_language_model_loss_passes_gradcheck(way: str) -> None:
    kind, settings = WAYS[way]
    states = make_states(1, torch.float64)[:, 0].detach().requires_grad_()
    labels = torch.tensor([3, 0, 49, 7, 7])

    def loss(states: Tensor, weight: Tensor) -> Tensor:
        head = kind(weight) if kind else (lambda states: 5.0 * torch.tanh(states @ weight.T / 5.0))
        given = {key: weight if value is ... else value for key, value in settings.items()}
        return language_model_loss(states, labels, head, 2, **given)

    weight = make_head(torch.float64)[0]
    assert torch.autograd.gradcheck(loss, (states, weight))
    assert torch.autograd.gradcheck(lambda states: loss(states, weight.detach()), (states,))  # a frozen head
    assert torch.autograd.gradcheck(lambda weight: loss(states.detach(), weight), (weight,))


def test_every_trained_weight_of_a_head_gets_its_gradient() -> None:
    """Also one that the head reads through others, twice, or beside a frozen one, as LoRA does."""
    frozen, weight = make_head(torch.float64)[0].detach(), make_head(torch.float64)[0]
    down = torch.randn(D, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    bias = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()

    def head(states: Tensor) -> Tensor:
        return states @ frozen.T + (states @ down) @ down.T @ weight.T + bias.cumsum(0)

    states, labels = make_states(4, torch.float64).flatten(0, 1), torch.arange(B * 4)
    assert {id(each) for each in trained_leaves(head(states.detach()))} == {id(down), id(bias), id(weight)}
    found = torch.autograd.grad(language_model_loss(states, labels, head, 6), [down, bias, weight])
    expected = torch.autograd.grad(slow.language_model_loss(states, labels, head), [down, bias, weight])
    for left, right in zip(found, expected, strict=True):
        assert relative(left, right) < 1e-12


@pytest.mark.parametrize("recompute", [False, True])
def test_language_model_loss_never_holds_all_logits(recompute: bool) -> None:
    seen = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return states @ torch.ones(D, V)

    states = make_states(4, torch.float32).flatten(0, 1)
    loss = language_model_loss(states, torch.zeros(B * 4, dtype=torch.int64), head, chunk=6, recompute=recompute)
    loss.backward()
    assert max(seen) == 6
    assert sum(seen) == (2 * B * 4 if recompute else B * 4 + 1)  # one row to see which weights the head reads


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
