"""The adaptation objective: one pass, two passes and the slow twin agree in loss and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llara.contract import Contract
from llara.model import EmbeddingModel
from llara.templates import PAPER, RELEASE
from llara.training.objective import AdaptModule, Plan, Prompts, collate, ragged
from tests import tiny
from tests.reference.adaptation import adaptation_loss

TEXTS = [[5, 6, 7, 7, 8, 9, 40], [10, 11, 10], [12, 13, 14, 15, 16, 17, 18, 19, 20, 12, 13], [30]]
NEXT = {"some": [[21, 22, 21], [], [23, 24, 25, 26], []], "all": [[21], [22, 22], [23], [24]], "none": [[], [], [], []]}


def make(template: Any = PAPER, family: str = "llama", bos: bool = True) -> EmbeddingModel:
    model = tiny.model(family, contract=Contract(template=template, bos=bos))
    model.add_missing_tokens()
    return model


def prompts_of(model: EmbeddingModel) -> Prompts:
    template = model.bind()
    return Prompts(template.passage, template.query, model.pad_id)


def batch_of(rows: list[list[int]], following: list[list[int]], prompts: Prompts, plan: Plan) -> dict[str, Any]:
    def arrays(lists: list[list[int]]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        return [np.array(row, dtype=np.int64) for row in lists]

    return collate(arrays(rows), arrays(following), prompts, plan)


def measure(model: EmbeddingModel, plan: Plan, following: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, sums, counts and the gradient of all weights as one vector."""
    model.lm.zero_grad()
    prompts = prompts_of(model)
    batch = batch_of(TEXTS, following, prompts, plan)
    loss, sums = AdaptModule(model, prompts, plan)(batch, batch["counts"])
    loss.backward()
    return loss.detach(), sums, batch["counts"], gradient(model)


def gradient(model: EmbeddingModel) -> Tensor:
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.lm.parameters()]
    return torch.cat([part.flatten() for part in parts])


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


CASES = [
    ("ebae+ebar", 0.0, True, "some"),
    ("ebae+ebar", 0.0, False, "some"),
    ("ebae+ebar", 0.5, True, "some"),
    ("ebae+ebar", 0.0, True, "all"),
    ("ebae+ebar", 1.0, False, "none"),
    ("ebae", 0.0, True, "some"),
    ("ebae", 0.5, False, "all"),
    ("ebar", 0.0, True, "some"),
    ("ebar", 0.5, True, "all"),
    ("lm", 0.0, True, "some"),
]


@pytest.mark.parametrize("template", [PAPER, RELEASE], ids=["one slot", "eight slots"])
@pytest.mark.parametrize(("objective", "lm_weight", "unique", "following"), CASES)
def test_one_pass_two_passes_and_the_slow_twin_agree(
    template: Any, objective: Any, lm_weight: float, unique: bool, following: str
) -> None:
    model = make(template)
    plan = Plan(objective, True, 0.7, lm_weight, unique)
    loss, sums, counts, grad = measure(model, plan, NEXT[following])
    apart = measure(model, plan._replace(one_pass=False), NEXT[following])
    torch.testing.assert_close(loss, apart[0], rtol=1e-5, atol=1e-5)
    assert_same_gradient(grad, apart[3])

    model.lm.zero_grad()
    prompts = prompts_of(model)
    expected, means = adaptation_loss(
        model,
        TEXTS,
        NEXT[following],
        {"self": prompts.self_side, "next": prompts.next_side},
        plan.branches,
        unique=unique,
        loss_scale=0.7,
        lm_weight=1.0 if objective == "lm" else lm_weight,
    )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradient(grad, gradient(model))
    for number, name in enumerate(("self", "next", "lm")):
        assert (counts[number] > 0) == (name in means)
        if name in means:
            assert float(sums[number] / counts[number]) == pytest.approx(means[name], rel=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES[1:])
def test_other_decoders_agree_with_the_slow_twin(family: str) -> None:
    model = make(family=family)
    plan = Plan("ebae+ebar", family != "mistral", 1.0, 0.25)  # mistral's texts here are longer than its window
    loss, _, _, grad = measure(model, plan, NEXT["some"])
    model.lm.zero_grad()
    prompts = prompts_of(model)
    sides = {"self": prompts.self_side, "next": prompts.next_side}
    expected, _ = adaptation_loss(
        model, TEXTS, NEXT["some"], sides, ("self", "next"), unique=True, loss_scale=1.0, lm_weight=0.25
    )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradient(grad, gradient(model))


def test_without_bos_the_first_token_is_not_predicted() -> None:
    model = make(bos=False)
    plan = Plan("lm", True, 1.0, 0.0)
    loss, _, counts, _ = measure(model, plan, NEXT["none"])
    prompts = prompts_of(model)
    assert prompts.self_side.prefix == ()
    assert counts.tolist() == [0, 0, sum(len(text) - 1 for text in TEXTS)]
    sides = {"self": prompts.self_side, "next": prompts.next_side}
    expected, _ = adaptation_loss(model, TEXTS, NEXT["none"], sides, (), unique=True, loss_scale=1.0, lm_weight=1.0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_batch_without_next_texts_gives_ebar_nothing() -> None:
    loss, sums, counts, grad = measure(make(), Plan("ebar", True, 1.0, 0.0), NEXT["none"])
    assert (float(loss), counts.tolist(), sums.tolist()) == (0.0, [0, 0, 0], [0, 0, 0])
    assert not grad.any()


def test_padding_beside_a_text_changes_nothing() -> None:
    model = make()
    plan = Plan("ebae+ebar", True, 1.0, 0.0)
    prompts = prompts_of(model)
    module = AdaptModule(model, prompts, plan)
    counts = torch.ones(3, dtype=torch.float64)
    together = batch_of(TEXTS, NEXT["all"], prompts, plan)
    sums = module(together, counts)[1]
    alone = [
        module(batch_of([text], [following], prompts, plan), counts)[1]
        for text, following in zip(TEXTS, NEXT["all"], strict=True)
    ]
    torch.testing.assert_close(sums, torch.stack(alone).sum(dim=0), rtol=1e-5, atol=1e-4)


def test_collate_lays_out_one_row_per_text() -> None:
    prompts = prompts_of(make())
    plan = Plan("ebae+ebar", True, 1.0, 1.0)
    batch = batch_of(TEXTS, NEXT["some"], prompts, plan)
    suffixes = [*prompts.self_side.suffix, *prompts.next_side.suffix]
    longest = max(len(text) for text in TEXTS) + len(prompts.self_side.prefix) + len(suffixes)
    assert batch["shared"].shape == (4, longest)
    assert batch["shared"].dtype == torch.int64
    first = [*prompts.self_side.prefix, *TEXTS[0], *suffixes]
    assert batch["shared"][0].tolist() == first + [prompts.pad_id] * (longest - len(first))
    assert batch["text_lengths"].tolist() == [len(prompts.self_side.prefix) + len(text) for text in TEXTS]
    assert batch["counts"].tolist() == [4, 2, sum(len(text) for text in TEXTS)]
    assert batch["self_ids"].tolist()[:6] == [5, 6, 7, 8, 9, 40]
    assert batch["next_rows"].tolist() == [0, 0, 2, 2, 2, 2]
    assert batch["next_ids"].tolist() == [21, 22, 23, 24, 25, 26]


def test_collate_keeps_branches_apart_where_they_run_alone() -> None:
    prompts = prompts_of(make())
    two = batch_of(TEXTS, NEXT["some"], prompts, Plan("ebae+ebar", False, 1.0, 0.0))
    assert "shared" not in two
    assert two["next"][1].tolist()[: 3 + len(prompts.self_side.prefix)] == [*prompts.self_side.prefix, *TEXTS[1]]
    one = batch_of(TEXTS, NEXT["some"], prompts, Plan("ebae", True, 1.0, 0.0))
    assert {"self", "self_ids"} <= one.keys() and not {"next", "shared", "next_ids"} & one.keys()
    plain = batch_of(TEXTS, NEXT["some"], prompts, Plan("lm", True, 1.0, 0.0))
    assert plain["text"].shape[1] == max(len(text) for text in TEXTS) + len(prompts.self_side.prefix)


def test_ragged_targets_with_and_without_repeats() -> None:
    targets = [np.array([3, 1, 3]), np.array([], dtype=np.int64), np.array([2])]
    rows, ids = ragged(targets, unique=True)
    assert (rows.tolist(), ids.tolist()) == ([0, 0, 2], [1, 3, 2])
    rows, ids = ragged(targets, unique=False)
    assert (rows.tolist(), ids.tolist()) == ([0, 0, 0, 2], [3, 1, 3, 2])
    assert (rows.dtype, ids.dtype) == (torch.int64, torch.int64)


def test_half_batches_add_up_to_one() -> None:
    model = make()
    prompts = prompts_of(model)
    plan = Plan("ebae+ebar", True, 1.0, 0.5)
    _, _, counts, whole = measure(model, plan, NEXT["some"])
    module = AdaptModule(model, prompts, plan)
    model.lm.zero_grad()
    for half in (slice(0, 1), slice(1, 4)):  # the second half has more texts, and fewer next texts per text
        loss, _ = module(batch_of(TEXTS[half], NEXT["some"][half], prompts, plan), counts)
        loss.backward()
    assert_same_gradient(gradient(model), whole)
