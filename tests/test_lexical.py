import numpy as np
import pytest
import torch

from llara import lexical
from llara.contract import Contract
from llara.errors import ConfigError, ModelError
from llara.lexical import TermOptions, TermReader, Terms, folded_ids
from llara.model import EmbeddingModel
from llara.templates import PAPER, RELEASE, REPLLAMA, SideName
from tests import tiny
from tests.reference.lexical import text_terms

TEXTS = [*tiny.TEXT, "", "short", "漢字 </s>", "Read READ read", tiny.TEXT[0] * 6]


def made(family: str = "llama", template: object = PAPER) -> EmbeddingModel:
    model = tiny.model(family, contract=Contract(template=template, bos=True))
    model.add_missing_tokens()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("template", [PAPER, RELEASE], ids=["paper", "release"])
@pytest.mark.parametrize(("expansion", "fold"), [(True, False), (True, True), (False, False), (False, True)])
def test_terms_are_those_of_the_slow_twin(family: str, template: object, expansion: bool, fold: bool) -> None:
    model = made(family, template)
    reader = TermReader(model, TermOptions(top_k=20, expansion=expansion, fold=fold))
    sides: tuple[SideName, ...] = ("query", "passage")
    for side in sides:
        _, terms = reader.encode(TEXTS, side, token_budget=120, max_length=90)
        assert len(terms) == len(TEXTS) and len(terms.ids) > len(TEXTS)
        for number, text in enumerate(TEXTS):
            ids, weights = terms.of(number)
            with torch.no_grad():
                expected = text_terms(model, text, side, top_k=20, expansion=expansion, fold=fold, length=90)
            assert ids.tolist() == [token for token, _ in expected]
            assert weights.tolist() == pytest.approx([weight for _, weight in expected], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_vectors_are_those_of_encode(family: str) -> None:
    model = made(family, RELEASE)
    model.lm.train()
    vectors, _ = TermReader(model).encode(TEXTS, "passage", token_budget=200)
    assert model.lm.training and not torch.is_inference_mode_enabled()
    assert torch.equal(vectors, model.encode(TEXTS, "passage", token_budget=200))
    assert vectors.dtype == torch.float32


def test_a_forward_pass_runs_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes, seen = made(), [], []
    trunk, head = model.trunk, model.head
    monkeypatch.setattr(model, "trunk", lambda **inputs: shapes.append(inputs["input_ids"].shape) or trunk(**inputs))
    monkeypatch.setattr(model, "head", lambda states: seen.append(len(states)) or head(states))
    counts: list[int] = []
    monkeypatch.setattr(lexical, "MOST_LOGITS", 2 * len(model.tokenizer))
    TermReader(model).encode(["a", "b", "c", "d", "e"], "query", 5 * 25, None, counts.append)
    assert [shape[0] for shape in shapes] == counts == [5]
    assert seen == [2, 2, 1]  # logits of two rows at a time, as many as are allowed


def test_no_texts_give_no_terms() -> None:
    vectors, terms = TermReader(made()).encode([], "query")
    assert vectors.shape == (0, tiny.HIDDEN) and len(terms) == 0 and terms.starts.tolist() == [0]
    assert (terms.starts.dtype, terms.ids.dtype, terms.weights.dtype) == (np.int64, np.int32, np.float32)


def test_special_tokens_and_rows_beyond_the_tokenizer_are_no_terms() -> None:
    model = made(template=RELEASE)
    model.lm.resize_token_embeddings(len(model.tokenizer) + 40)  # as heads are that are filled up to a round number
    reader = TermReader(model, TermOptions(top_k=10**6))
    _, terms = reader.encode(TEXTS, "passage")
    special = {*model.tokenizer.all_special_ids, *model.bind().passage.suffix[-8:], *model.bind().query.suffix[-8:]}
    assert special.isdisjoint(terms.ids.tolist())
    assert int(terms.ids.max()) < len(model.tokenizer)
    assert (~reader.counted).sum() == len(special) + 40


def test_a_joint_prefix_is_not_the_texts_own() -> None:
    model = made(template=REPLLAMA)
    template, words = model.bind(), model.tokenizer
    for text in ("why is the sky blue", "", "query: query"):
        row = template.encode([text], "query", 64)[0]
        assert words.decode(template.unwrap(row, "query")).strip() == text
    reader = TermReader(model, TermOptions(expansion=False, top_k=1000))
    assert reader.own_terms(template.unwrap(template.encode(["sky"], "query", 64)[0], "query"))
    _, terms = reader.encode([""], "query")
    assert len(terms.ids) == 0


def test_case_and_space_variants_fold_into_the_first_of_them() -> None:
    words = tiny.tokenizer()
    words.add_tokens(["read", " read", "Read", " READ", "reader"])
    folded = folded_ids(words, len(words) + 3)
    variants = [token for token in range(len(words)) if words.decode([token]).strip().lower() == "read"]
    assert len(variants) >= 4
    assert set(folded[variants].tolist()) == {variants[0]}
    assert folded[words.convert_tokens_to_ids("reader")] != variants[0]
    alone = [words.bos_token_id, words.eos_token_id, words.convert_tokens_to_ids("Ġ"), len(words) + 2]
    assert folded[alone].tolist() == alone
    halves = [token for token in range(len(words)) if "\N{REPLACEMENT CHARACTER}" in words.decode([token])]
    assert len(halves) > 100 and folded[halves].tolist() == halves


def test_folded_terms_are_few_and_have_the_largest_weight() -> None:
    model = made()
    plain = TermReader(model, TermOptions(top_k=1000)).encode(["read a file"], "passage")[1]
    folded_terms = TermReader(model, TermOptions(top_k=1000, fold=True)).encode(["read a file"], "passage")[1]
    target = folded_ids(model.tokenizer, len(model.tokenizer))
    best: dict[int, float] = {}
    for token, weight in zip(plain.ids.tolist(), plain.weights.tolist(), strict=True):
        best[int(target[token])] = max(best.get(int(target[token]), 0.0), weight)
    assert dict(zip(folded_terms.ids.tolist(), folded_terms.weights.tolist(), strict=True)) == best
    assert len(best) < len(plain.ids)


def test_a_head_that_says_nothing_gives_no_terms() -> None:
    model = made("phi")  # its head has a bias
    with torch.no_grad():
        model.lm.get_output_embeddings().bias.fill_(-1e4)
    assert len(TermReader(model).encode(["the sky"], "query")[1].ids) == 0


def test_a_direction_is_taken_out_before_the_head() -> None:
    model = made(template=RELEASE)
    reader = TermReader(model, TermOptions(top_k=1000))
    direction = torch.nn.functional.normalize(
        torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(0)), dim=0
    )
    slots = torch.randn(3, 8, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([each - float(each @ direction) * direction for each in slots.flatten(0, 1)])
    found = reader.without(direction).logits(slots)
    assert torch.allclose(found, reader.logits(expected.reshape(slots.shape)), atol=1e-4)
    assert not torch.allclose(found, reader.logits(slots), atol=1e-2)
    vectors, terms = reader.without(direction).encode(TEXTS, "passage")
    assert torch.equal(vectors, model.encode(TEXTS, "passage"))  # the dense vectors stay as they are
    assert terms.ids.tolist() != reader.encode(TEXTS, "passage")[1].ids.tolist()


def test_rows_are_joined_and_read_back() -> None:
    rows = [(np.array([5, 2]), np.array([2.0, 1.0], np.float32)), (np.empty(0, np.int64), np.empty(0, np.float32))]
    terms = Terms.of_rows([*rows, rows[0]])
    assert [terms.of(number)[0].tolist() for number in range(3)] == [[5, 2], [], [5, 2]]
    assert terms.of(2)[1].tolist() == [2.0, 1.0]


def test_a_model_without_a_head_is_refused() -> None:
    model = made()
    model.has_head = False
    with pytest.raises(ModelError, match="held no LM head"):
        TermReader(model)


def test_options_and_lengths_are_checked() -> None:
    with pytest.raises(ConfigError, match="top_k: must be 1 or more, got 0"):
        TermOptions(top_k=0)
    with pytest.raises(ConfigError, match="leaves no room for text"):
        TermReader(made()).encode(["x"], "passage", max_length=3)
    with pytest.raises(ConfigError, match="more than the 512 positions"):
        TermReader(made()).encode(["x"], "passage", max_length=600)
