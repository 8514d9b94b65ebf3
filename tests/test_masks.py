from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from llara.masks import (
    BLOCK,
    Layout,
    MaskForm,
    Padding,
    block_mask,
    branch_layout,
    dense_mask,
    packed_layout,
    prepared_mask,
)
from tests import tiny
from tests.reference import masks as slow

SELF, NEXT = [7, 8, 9, 1], [17, 18, 1]  # suffixes of different lengths


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("own", "other"), [(1, 1), (3, 2), (2, 5), (0, 2), (2, 0)])
@pytest.mark.parametrize(("lengths", "extra"), [([1], 0), ([4], 2), ([0, 3], 0), ([2, 9, 5], 0), ([6, 6, 6, 1], 3)])
def test_layout_equals_the_slow_twin(lengths: list[int], extra: int, own: int, other: int, padding: Padding) -> None:
    width = max(lengths) + own + other + extra
    layout, self_end, next_end = branch_layout(torch.tensor(lengths), own, other, width, padding)
    mask = dense_mask(layout)
    rows = [slow.kinds(length, own, other, width, padding) for length in lengths]
    assert mask.shape == (len(lengths), 1, width, width)
    assert mask.dtype == torch.bool
    assert mask[:, 0].tolist() == [slow.mask(row) for row in rows]
    assert dense_mask(layout, window=3)[:, 0].tolist() == [slow.windowed(row, 3) for row in rows]
    assert layout.position_ids.tolist() == [slow.position_ids(row) for row in rows]
    if own:
        assert self_end.tolist() == [slow.end(row, "self") for row in rows]
    if other:
        assert next_end.tolist() == [slow.end(row, "next") for row in rows]


def test_no_position_sees_nothing() -> None:
    layout = branch_layout(torch.tensor([1, 8]), 2, 2, 12, "left").layout
    assert bool(dense_mask(layout).any(dim=-1).all())


@pytest.mark.parametrize(("own", "other"), [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("lengths", [[1], [4, 2, 9], [6, 6, 6, 1, 20]])
@pytest.mark.parametrize("multiple", [1, 16])
def test_packed_layout_equals_the_slow_twin(lengths: list[int], own: int, other: int, multiple: int) -> None:
    layout = packed_layout(lengths, own, other, multiple)
    used = sum(lengths) + len(lengths) * (own + other)
    width = -(-used // multiple) * multiple
    assert layout.documents.shape == (1, width)
    assert dense_mask(layout)[0, 0].tolist() == slow.packed(lengths, own, other, width)
    rows = [slow.kinds(length, own, other, length + own + other, "right") for length in lengths]
    assert layout.position_ids[0, :used].tolist() == [each for row in rows for each in slow.position_ids(row)]
    assert not layout.position_ids[0, used:].any()


@pytest.mark.parametrize("lengths", [[1], [5, 300, 2], [100] * 9, [128 - 5] * 4, [700]])
@pytest.mark.parametrize("window", [None, 50])
def test_block_mask_covers_all_that_is_visible(lengths: list[int], window: int | None) -> None:
    layout = packed_layout(lengths, 3, 2)
    blocks, dense = block_mask(layout, window), dense_mask(layout, window)
    width = dense.shape[-1]
    assert blocks.shape == (1, 1, width, width)
    # The rule itself gives the mask cell by cell, and no cell outside the blocks is visible.
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, width, width, device="cpu"), dense)
    looked_at = blocks.to_dense().bool().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    assert not (dense & ~looked_at).any()
    if len(lengths) > 4:
        assert float(looked_at.float().mean()) < 0.5


@pytest.mark.parametrize("window", ["nowhere", "everywhere", "by layer"])
@pytest.mark.parametrize("added", [False, True])
def test_a_mask_is_made_in_the_form_that_is_asked_for(window: Any, added: bool) -> None:
    layout = branch_layout(torch.tensor([9, 4]), 2, 2, 13).layout
    made = prepared_mask(layout, MaskForm(added, window), 3, torch.float32)
    kinds = made if window == "by layer" else {"full_attention" if window == "nowhere" else "sliding_attention": made}
    expected = {"full_attention": dense_mask(layout), "sliding_attention": dense_mask(layout, 3)}
    assert list(kinds) == [key for key in expected if key in kinds]
    for key, mask in kinds.items():
        assert mask.dtype == (torch.float32 if added else torch.bool)
        assert torch.equal(mask == 0 if added else mask, expected[key])


def random_texts(count: int, lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(20, 400, (lengths[n % len(lengths)],), generator=generator).tolist() for n in range(count)]


def run_together(lm: Any, texts: list[list[int]], padding: Padding) -> tuple[Tensor, Tensor, Tensor]:
    rows = [[*text, *SELF, *NEXT] for text in texts]
    width = max(map(len, rows))
    fill = [[399] * (width - len(row)) for row in rows]
    ids = [pad + row if padding == "left" else row + pad for row, pad in zip(rows, fill, strict=True)]
    lengths = torch.tensor([len(text) for text in texts])
    layout, self_end, next_end = branch_layout(lengths, len(SELF), len(NEXT), width, padding)
    with torch.no_grad():
        return lm.base_model(**inputs_of(torch.tensor(ids), layout)).last_hidden_state, self_end, next_end


def inputs_of(ids: Tensor, layout: Layout) -> dict[str, Any]:
    mask = dense_mask(layout)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": layout.position_ids, "use_cache": False}


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
    states, self_end, next_end = run_together(lm, texts, padding)
    for number, text in enumerate(texts):
        for suffix, ends in ((SELF, self_end), (NEXT, next_end)):
            end = int(ends[number])
            found = states[number, end - len(suffix) : end]
            expected = run_alone(lm, text, suffix)[-len(suffix) :]
            assert float(expected.abs().max()) > 0.1
            assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_branch_does_not_feel_the_other(lm_of: Callable[[str], Any], family: str) -> None:
    lm, (text,) = lm_of(family), random_texts(1, (12,))
    ids = torch.tensor([[*text, *SELF, *NEXT], [*text, *(50, 51, 52, 53), *NEXT]])
    layout = branch_layout(torch.tensor([12, 12]), len(SELF), len(NEXT), ids.shape[1]).layout
    with torch.no_grad():
        states = lm.base_model(**inputs_of(ids, layout)).last_hidden_state
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
    layout, self_end, next_end = branch_layout(torch.tensor([9, 4]), len(SELF), len(NEXT), width)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    states = lm.base_model(**inputs_of(ids, layout)).last_hidden_state
    picked = [states[n, int(end) - 1] for n in range(2) for end in (self_end[n], next_end[n])]
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
