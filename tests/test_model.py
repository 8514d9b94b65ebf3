from typing import Any

import pytest
import torch

from llara.contract import Contract
from llara.errors import ConfigError
from llara.model import EmbeddingModel
from llara.pooling import slot_states
from llara.templates import RELEASE, REPLLAMA
from tests import tiny
from tests.kept import refuse_kept

TEXTS = [*tiny.TEXT, "", "short", "漢字 </s>", tiny.TEXT[0] * 6]


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "bloom"])
def model(request: pytest.FixtureRequest) -> EmbeddingModel:
    """One model per shape; mistral's texts are longer than its window."""
    return tiny.model(request.param)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def embed(model: EmbeddingModel, rows: list[list[int]], slots: Any, budget: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.embed(rows, slots, budget)


def slow_embed(model: EmbeddingModel, row: list[int], slots: int) -> torch.Tensor:
    """One row by itself, through the model's own forward."""
    with torch.no_grad():
        states = model.lm(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -slots:]
    vector = sum(states) / slots
    return vector / vector.norm() if model.contract.normalise else vector


@pytest.mark.parametrize("budget", [1, 40, 100, 10**6, None])
def test_vectors_do_not_depend_on_the_batch(model: EmbeddingModel, budget: int | None) -> None:
    rows = model.bind().encode(TEXTS, "passage", 160)
    assert len({len(row) for row in rows}) > 4
    expected = torch.stack([slow_embed(model, row, 1) for row in rows])
    assert difference(embed(model, rows, 1, budget), expected) < 1e-5
    assert difference(embed(model, rows[::-1], 1, budget), expected.flip(0)) < 1e-5


def test_order_is_kept_among_rows_of_equal_length(model: EmbeddingModel) -> None:
    rows = [[0, first, second, 1] for first in range(20, 23) for second in range(30, 34)]
    expected = torch.stack([slow_embed(model, row, 1) for row in rows])
    assert difference(embed(model, rows, 1, 12), expected) < 1e-5


@pytest.mark.parametrize("normalise", [True, False])
def test_slots_that_differ_per_row(normalise: bool) -> None:
    model = tiny.model("llama", contract=Contract(normalise=normalise))
    rows = [[20, 21, 1], [22, 1, 1, 1, 1, 1], [23, 24, 25, 26, 27, 28, 29, 1, 1], [1], [30, 31]]
    slots = [1, 5, 2, 1, 2]
    expected = torch.stack([slow_embed(model, row, count) for row, count in zip(rows, slots, strict=True)])
    for budget in (1, 18, 1000):
        assert difference(embed(model, rows, slots, budget), expected) < 1e-5


def test_no_rows_give_no_vectors(model: EmbeddingModel) -> None:
    assert embed(model, [], 1).shape == (0, model.dim)
    assert model.encode([], "query").shape == (0, model.dim)


def test_on_batch_counts_every_row_once() -> None:
    model, seen = tiny.model("llama"), []
    rows = [[20] * length for length in (3, 9, 4, 8, 1, 7)]
    with torch.no_grad():
        model.embed(rows, 1, 18, seen.append)
    assert seen == [2, 2, 2]
    seen.clear()
    model.encode(["a", "b", "c"], "query", token_budget=1, on_batch=seen.append)
    assert seen == [1, 1, 1]


def test_no_batch_leaves_a_block_of_its_own_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    # Kept until the end, each lies where the states of its batch were: encoding 5,183 passages grew by 840 MB.
    model = tiny.model("llama")
    pooled = refuse_kept(monkeypatch, model, "pool")
    rows = [[20] * length for length in (3, 9, 4, 8, 1, 7)]
    embed(model, rows, 1, 18)
    assert len(pooled) == 3


@pytest.mark.parametrize("template", [REPLLAMA, RELEASE], ids=["repllama", "release"])
def test_encode_normalises_and_truncates(template: Any) -> None:
    model = tiny.model("llama", contract=Contract(template=template, bos=True))
    model.add_missing_tokens()
    for side in ("query", "passage"):
        vectors = model.encode(TEXTS, side, max_length=130)
        assert vectors.dtype == torch.float32
        assert not vectors.requires_grad
        assert float((vectors.norm(dim=-1) - 1).abs().max()) < 1e-5
        rows = model.bind().encode(TEXTS, side, 130)
        slots = model.bind().side(side).slots
        assert max(map(len, rows)) == 130
        assert difference(vectors, torch.stack([slow_embed(model, row, slots) for row in rows])) < 1e-5
    assert difference(model.encode(["x"], "query"), model.encode(["x"], "passage")) > 0.01


def test_encode_without_normalisation() -> None:
    model = tiny.model("llama", contract=Contract(bos=True, normalise=False))
    assert float(model.encode(["x"], "query").norm()) > 1.5


def test_lengths_of_the_contract_hold() -> None:
    model = tiny.model("llama", contract=Contract(bos=True, query_length=20, passage_length=60))
    long, cut = tiny.TEXT[0] * 9, model.bind().encode([tiny.TEXT[0] * 9], "query", 20)
    assert len(cut[0]) == 20
    assert difference(model.encode([long], "query"), embed(model, cut, 1)) < 1e-6
    assert difference(model.encode([long], "query"), model.encode([long], "query", max_length=60)) > 1e-3


def test_encode_leaves_the_training_mode_as_it_was() -> None:
    model = tiny.model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    expected = model.encode(["some text"], "query")
    model.lm.train()
    assert difference(model.encode(["some text"], "query"), expected) == 0
    assert model.lm.training


def test_gradients_flow_through_embed() -> None:
    model = tiny.model("llama")
    rows = [[20, 21, 1], [22, 1], [23, 24, 25, 1]]
    vectors = model.embed(rows, 1, token_budget=4)
    vectors[1].sum().backward()
    gradient = model.lm.get_input_embeddings().weight.grad
    assert [bool(gradient[token].any()) for token in (20, 22, 23)] == [False, True, False]


def test_padding_has_an_id_with_and_without_a_pad_token() -> None:
    assert tiny.model("llama").pad_id == 2
    assert tiny.model("llama", words=tiny.tokenizer(pad=False)).pad_id == 1
    assert tiny.model("llama", words=tiny.tokenizer(pad=False, eos=False)).pad_id == 0


def test_pad_fills_on_the_right() -> None:
    ids, lengths = tiny.model("llama").pad([[5], [6, 7, 8]])
    assert ids.tolist() == [[5, 2, 2], [6, 7, 8]]
    assert lengths.tolist() == [1, 3]


def test_slot_states_pick_the_positions_before_the_end() -> None:
    states = torch.arange(24.0).reshape(2, 6, 2)
    found = slot_states(states, torch.tensor([6, 3]), 2)
    assert found.tolist() == [states[0, 4:6].tolist(), states[1, 1:3].tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_comes_out_as_float32(dtype: torch.dtype) -> None:
    model = tiny.model("llama")
    expected = model.encode(TEXTS, "passage")
    model.lm.to(dtype)
    found = model.encode(TEXTS, "passage")
    assert found.dtype == torch.float32
    assert difference(found, expected) < 0.05


def test_dim_is_that_of_the_projected_states() -> None:
    opt = tiny.model("opt", word_embed_proj_dim=16)
    assert opt.dim == 16
    assert opt.encode(["the sky"], "query").shape == (1, 16)


def test_a_text_beyond_the_positions_is_refused() -> None:
    gpt2 = tiny.model("gpt2", n_positions=32)
    with pytest.raises(ConfigError, match="a passage length of 160 tokens is more than the 32 positions of tiny gpt2"):
        gpt2.encode(["the sky"], "passage")
    assert gpt2.encode(["the sky"], "passage", max_length=32).shape[0] == 1


def test_vectors_have_unit_length_in_float32_also_where_the_model_runs_in_less() -> None:
    model = tiny.model("llama")
    model.lm.to(torch.float16)
    norms = model.encode(["the sky is blue", "read a file"], "passage").norm(dim=1)
    assert float((norms - 1).abs().max()) < 1e-6
