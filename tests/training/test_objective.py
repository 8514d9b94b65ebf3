"""The adaptation objective: one pass, two passes and the slow twin agree in loss and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from llara.contract import Contract
from llara.masks import BLOCK, Layout, MaskForm, block_mask, packed_layout
from llara.model import EmbeddingModel
from llara.templates import PAPER, RELEASE
from llara.training.objective import AdaptModule, Plan, Prompts, collate, targets_of
from tests import tiny
from tests.reference.adaptation import adaptation_loss, branch_loss, branch_recall

FORMS = {"mistral": MaskForm(window="everywhere")}  # its texts here are longer than its window
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
    plan = Plan("ebae+ebar", True, 1.0, 0.25, form=FORMS.get(family, MaskForm()))
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("template", [PAPER, RELEASE], ids=["one slot", "eight slots"])
def test_packed_rows_give_the_loss_and_gradient_of_separate_passes(family: str, template: Any) -> None:
    model = make(template, family)
    plan = Plan("ebae+ebar", True, 0.7, 0.5, form=FORMS.get(family, MaskForm()), packed=True)
    loss, sums, counts, grad = measure(model, plan, NEXT["some"])
    apart = measure(model, plan._replace(one_pass=False), NEXT["some"])
    torch.testing.assert_close(loss, apart[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, apart[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(counts, apart[2])
    assert_same_gradient(grad, apart[3])


def test_collate_packs_all_texts_into_one_row() -> None:
    prompts = prompts_of(make())
    plan = Plan("ebae+ebar", True, 1.0, 1.0, packed=True)
    batch, apart = (batch_of(TEXTS, NEXT["some"], prompts, each) for each in (plan, plan._replace(packed=False)))
    suffixes = [*prompts.self_side.suffix, *prompts.next_side.suffix]
    row = [token for text in TEXTS for token in (*prompts.self_side.prefix, *text, *suffixes)]
    assert batch["shared"].tolist() == [row + [prompts.pad_id] * (BLOCK - len(row))]
    assert (batch["tokens"], batch["cells"]) == (len(row), BLOCK)
    assert batch["documents"].shape == batch["parts"].shape == batch["position_ids"].shape == (1, BLOCK)
    for name in ("counts", "self_rows", "self_ids", "self_weights", "next_ids", "lm_ids"):
        assert torch.equal(batch[name], apart[name])
    for name in ("self_slots", "next_slots", "lm_slots"):
        assert torch.equal(batch["shared"].flatten()[batch[name]], apart["shared"].flatten()[apart[name]])


@pytest.mark.parametrize("objective", ["ebae", "lm"])
def test_rows_of_one_branch_are_not_packed(objective: Any) -> None:
    plan = Plan(objective, True, 1.0, 0.0, packed=True)
    assert not plan.packs
    assert "documents" not in batch_of(TEXTS, NEXT["some"], prompts_of(make()), plan)


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


def arrays(lists: list[list[int]]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    return [np.array(row, dtype=np.int64) for row in lists]


def test_targets_stand_once_per_text_and_their_weights_sum_to_one() -> None:
    targets = arrays([[3, 1, 3], [], [2]])
    rows, ids, weights = targets_of(targets, unique=True)
    assert (rows.tolist(), ids.tolist(), weights.tolist()) == ([0, 0, 2], [1, 3, 2], [0.5, 0.5, 1])
    assert (rows.dtype, ids.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
    rows, ids, weights = targets_of(targets, unique=False)
    assert (rows.tolist(), ids.tolist()) == ([0, 0, 2], [1, 3, 2])
    assert weights.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("unique", [True, False])
def test_targets_follow_the_weights_of_their_tokens(unique: bool) -> None:
    table = np.array([0, 1, 0.5, 0, 2], dtype=np.float32)
    rows, ids, weights = targets_of(arrays([[0, 3], [4, 1, 2, 4, 3], [1, 4]]), (1,), table, unique=unique)
    assert (rows.tolist(), ids.tolist()) == ([1, 1, 2], [2, 4, 4])  # nothing left of the first; 1 is special
    whole = 2.5 if unique else 4.5
    assert weights.tolist() == pytest.approx([0.5 / whole, 1 - 0.5 / whole, 1])


def test_a_text_whose_tokens_weigh_nothing_is_not_counted() -> None:
    model = make()
    prompts, plan = prompts_of(model), Plan("ebae+ebar", True, 1.0, 0.0)
    table = np.linspace(0, 1, 400, dtype=np.float32)
    table[[10, 11, 30, 21, 22]] = 0
    batch = collate(arrays(TEXTS), arrays(NEXT["some"]), prompts, plan, table)
    assert batch["counts"].tolist() == [2, 1, 0]
    _, sums = AdaptModule(model, prompts, plan)(batch, batch["counts"])
    for number, (side, targets) in enumerate(((prompts.self_side, TEXTS), (prompts.next_side, NEXT["some"]))):
        expected = 0.0
        for text, target in zip(TEXTS, targets, strict=True):
            weights = {token: float(table[token]) for token in set(target)}
            for token, weight in weights.items():
                if weight:
                    expected += weight / sum(weights.values()) * float(branch_loss(model, text, side, [token]).detach())
        assert float(sums[number]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("template", [PAPER, RELEASE], ids=["one slot", "eight slots"])
@pytest.mark.parametrize("one_pass", [True, False])
def test_recall_equals_the_slow_twin(template: Any, one_pass: bool) -> None:
    model = make(template)
    prompts, plan = prompts_of(model), Plan("ebae+ebar", one_pass, 1.0, 0.0)
    # Targets that the model does name, or all recalls would be zero.
    following = [
        [int(token) for token in model.lm(torch.tensor([text])).logits[0, -1].topk(40).indices] for text in TEXTS
    ]
    following[1] = []
    found = AdaptModule(model, prompts, plan).recall(batch_of(TEXTS, following, prompts, plan))
    for number, (side, targets) in enumerate(((prompts.self_side, TEXTS), (prompts.next_side, following))):
        each = [branch_recall(model, *pair) for pair in zip(TEXTS, [side] * 4, targets, strict=True) if pair[2]]
        assert found[number].tolist() == pytest.approx([sum(each), len(each)], rel=1e-5)
    assert float(found[1, 0]) > 0


def test_recall_of_a_branch_that_is_not_trained_is_zero() -> None:
    model = make()
    prompts, plan = prompts_of(model), Plan("ebar", True, 1.0, 0.0)
    found = AdaptModule(model, prompts, plan).recall(batch_of(TEXTS, NEXT["some"], prompts, plan))
    assert found[0].tolist() == [0, 0]
    assert float(found[1, 1]) == 2


@pytest.mark.parametrize("one_pass", [True, False])
def test_tokens_and_cells_are_counted(one_pass: bool) -> None:
    prompts = prompts_of(make())
    batch = batch_of(TEXTS, NEXT["some"], prompts, Plan("ebae+ebar", one_pass, 1.0, 1.0))
    kinds = ("shared",) if one_pass else ("self", "next")
    assert batch["cells"] == sum(batch[kind].numel() for kind in kinds)
    starts = sum(len(prompts.self_side.prefix) + len(text) for text in TEXTS)
    suffixes = len(prompts.self_side.suffix) + len(prompts.next_side.suffix)
    assert batch["tokens"] == starts * len(kinds) + suffixes * len(TEXTS)


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


class RefuseSyncs(TorchDispatchMode):
    """Raises where the values of a tensor decide what is done next, for which a GPU would have to be waited for."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket.__name__ == "index" and any(
            each.dtype == torch.bool for each in args[1] if each is not None
        )
        if by_mask or func.overloadpacket.__name__ in self.OPERATIONS:
            raise AssertionError(f"waits for the device: {func}")
        return func(*args, **(kwargs or {}))


STEPS = [("ebae+ebar", True, 0.0), ("ebae+ebar", True, 1.0), ("ebae+ebar", False, 1.0), ("ebar", True, 0.0)]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("objective", "one_pass", "lm_weight"), [*STEPS, ("lm", True, 0.0)])
def test_no_step_waits_for_the_device(
    family: str, objective: Any, one_pass: bool, lm_weight: float, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(RELEASE, family)
    form = MaskForm(added=family == "gemma2")
    if (objective, one_pass) != ("ebae+ebar", True):
        # Where no mask is handed in, transformers itself asks once per pass whether texts are packed into one row.
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    prompts, plan = prompts_of(model), Plan(objective, one_pass, 1.0, lm_weight, form=form, packed=packed)
    batch = batch_of(TEXTS, NEXT["some"], prompts, plan)
    module = AdaptModule(model, prompts, plan)
    with RefuseSyncs():
        module(batch, batch["counts"])[0].backward()

    # On the meta device tensors have no values at all, and none that was left on the CPU can be mixed in.
    model.lm.to("meta")
    elsewhere = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in batch.items()}
    loss, sums = module(elsewhere, elsewhere["counts"])
    loss.backward()
    assert (loss.device.type, sums.device.type) == ("meta", "meta")


def test_making_a_block_mask_waits_for_no_device() -> None:
    layout = packed_layout([5, 300, 2], 3, 2)
    with RefuseSyncs():
        found = block_mask(layout, 50)
    elsewhere = block_mask(Layout(*(each.to("meta") for each in layout)), 50)
    assert found.kv_num_blocks.shape == elsewhere.kv_num_blocks.shape == (1, 1, 3)


def test_the_guard_against_waiting_finds_what_waits() -> None:
    values = torch.tensor([1.0, 0.0])
    for waits in (
        lambda: values[values > 0],
        lambda: values[0].item(),
        lambda: values.nonzero(),
        lambda: bool(values[0]),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), RefuseSyncs():
            waits()
