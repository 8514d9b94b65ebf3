from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llara.masks import BranchLayout, Padding, branch_layout
from tests import tiny
from tests.reference import masks as slow

SELF, NEXT = [7, 8, 9, 1], [17, 18, 1]  # suffixes of different lengths


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("own", "other"), [(1, 1), (3, 2), (2, 5), (0, 2), (2, 0)])
@pytest.mark.parametrize(("lengths", "extra"), [([1], 0), ([4], 2), ([0, 3], 0), ([2, 9, 5], 0), ([6, 6, 6, 1], 3)])
def test_layout_equals_the_slow_twin(lengths: list[int], extra: int, own: int, other: int, padding: Padding) -> None:
    width = max(lengths) + own + other + extra
    layout = branch_layout(torch.tensor(lengths), own, other, width, padding)
    rows = [slow.kinds(length, own, other, width, padding) for length in lengths]
    assert layout.mask.shape == (len(lengths), 1, width, width)
    assert layout.mask.dtype == torch.bool
    assert layout.mask[:, 0].tolist() == [slow.mask(row) for row in rows]
    assert layout.position_ids.tolist() == [slow.position_ids(row) for row in rows]
    if own:
        assert layout.self_end.tolist() == [slow.end(row, "self") for row in rows]
    if other:
        assert layout.next_end.tolist() == [slow.end(row, "next") for row in rows]


def test_no_position_sees_nothing() -> None:
    layout = branch_layout(torch.tensor([1, 8]), 2, 2, 12, "left")
    assert bool(layout.mask.any(dim=-1).all())


def random_texts(count: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(20, 400, (lengths[n % len(lengths)],), generator=generator).tolist() for n in range(count)]


def run_together(lm: Any, texts: list[list[int]], padding: Padding) -> tuple[Tensor, BranchLayout]:
    rows = [[*text, *SELF, *NEXT] for text in texts]
    width = max(map(len, rows))
    fill = [[399] * (width - len(row)) for row in rows]
    ids = [pad + row if padding == "left" else row + pad for row, pad in zip(rows, fill, strict=True)]
    layout = branch_layout(torch.tensor([len(text) for text in texts]), len(SELF), len(NEXT), width, padding)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": layout.mask, "position_ids": layout.position_ids}
    with torch.no_grad():
        return lm.base_model(**inputs, use_cache=False).last_hidden_state, layout


def run_alone(lm: Any, text: list[int], suffix: list[int]) -> Tensor:
    with torch.no_grad():
        return lm.base_model(input_ids=torch.tensor([[*text, *suffix]]), use_cache=False).last_hidden_state[0]


@pytest.fixture(scope="module")
def lm_of() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            # Its window is longer than these rows: where it acts, test_parity.py shows that it needs two passes.
            wide = {"sliding_window": 64} if family == "mistral" else {}
            made[family] = tiny.language_model(family, **wide)
        return made[family]

    return get


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_each_branch_equals_the_branch_run_alone(
    lm_of: Callable[[str], Any], family: str, count: int, padding: Padding
) -> None:
    lm, texts = lm_of(family), random_texts(count, (30, 11, 1))
    states, layout = run_together(lm, texts, padding)
    for number, text in enumerate(texts):
        for suffix, ends in ((SELF, layout.self_end), (NEXT, layout.next_end)):
            end = int(ends[number])
            found = states[number, end - len(suffix) : end]
            expected = run_alone(lm, text, suffix)[-len(suffix) :]
            assert float(expected.abs().max()) > 0.1
            assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_branch_does_not_feel_the_other(lm_of: Callable[[str], Any], family: str) -> None:
    lm, (text,) = lm_of(family), random_texts(1, (12,))
    ids = torch.tensor([[*text, *SELF, *NEXT], [*text, *(50, 51, 52, 53), *NEXT]])
    layout = branch_layout(torch.tensor([12, 12]), len(SELF), len(NEXT), ids.shape[1])
    inputs = {"input_ids": ids, "attention_mask": layout.mask, "position_ids": layout.position_ids}
    with torch.no_grad():
        states = lm.base_model(**inputs, use_cache=False).last_hidden_state
    assert float((states[0, -len(NEXT) :] - states[1, -len(NEXT) :]).abs().max()) < 1e-6
    assert float((states[0, 12:16] - states[1, 12:16]).abs().max()) > 0.1


def test_the_plain_causal_mask_would_be_wrong(lm_of: Callable[[str], Any]) -> None:
    """The comparison above can fail: without the prepared mask NEXT sees SELF, and differs."""
    lm, (text,) = lm_of("llama"), random_texts(1, (12,))
    wrong = run_alone(lm, text, [*SELF, *NEXT])[-len(NEXT) :]
    assert float((wrong - run_alone(lm, text, NEXT)[-len(NEXT) :]).abs().max()) > 0.1


def test_gradients_of_one_pass_equal_those_of_two() -> None:
    lm, texts = tiny.language_model("llama"), random_texts(2, (9, 4))
    rows = [[*text, *SELF, *NEXT] for text in texts]
    width = max(map(len, rows))
    layout = branch_layout(torch.tensor([9, 4]), len(SELF), len(NEXT), width)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    states = lm.base_model(
        input_ids=ids, attention_mask=layout.mask, position_ids=layout.position_ids
    ).last_hidden_state
    picked = [states[n, int(end) - 1] for n in range(2) for end in (layout.self_end[n], layout.next_end[n])]
    torch.stack(picked).pow(3).sum().backward()
    together = [weight.grad.clone() for weight in lm.base_model.parameters()]
    lm.zero_grad()
    alone = [
        lm.base_model(input_ids=torch.tensor([[*text, *suffix]])).last_hidden_state[0, -1]
        for text in texts
        for suffix in (SELF, NEXT)
    ]
    torch.stack(alone).pow(3).sum().backward()
    for left, weight in zip(together, lm.base_model.parameters(), strict=True):
        assert float((left - weight.grad).norm()) <= 1e-4 * float(weight.grad.norm())
