"""What each token weighs as a target: stop words and punctuation nothing, rare tokens more."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from llara.config import AdaptConfig, ModelConfig
from llara.errors import ConfigError, DataError
from llara.loading import load_model
from llara.training.adapt import adapt
from llara.training.chunks import ChunkStore
from llara.training.prepare import prepare_chunks
from llara.training.targets import inverse_document_frequency, stop_words, target_weights, without_stop_words
from tests import tiny
from tests.training.helpers import adapt_config, write_lines, write_text

DOCUMENTS = ["the sky is blue", "the sky is red", "the file is read"]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """The tokenizer of the model inside the package: byte-level, with whole English words."""
    tokenizer: PreTrainedTokenizerFast = load_model(ModelConfig(model="mini", device="cpu", offline=True)).tokenizer
    return tokenizer


def prepared(tmp_path: Path, **changes: Any) -> tuple[AdaptConfig, ChunkStore]:
    rows = [{"_id": str(number), "text": text} for number, text in enumerate(DOCUMENTS)]
    corpus = write_lines(tmp_path / "c.jsonl", rows)
    config = adapt_config(Path("base"), corpus, tmp_path / "out", min_chunk_length=1, **changes)
    return config, prepare_chunks(tmp_path / "chunks", config, tiny.model())


@pytest.mark.parametrize("targets", ["unique", "all"])
def test_without_a_choice_all_tokens_weigh_the_same(tmp_path: Path, targets: str) -> None:
    config, store = prepared(tmp_path, targets=targets)
    assert target_weights(config, tiny.tokenizer(), store) is None


def test_stop_words_and_punctuation_weigh_nothing(words: PreTrainedTokenizerFast) -> None:
    weights = without_stop_words(words, stop_words("english"), len(words) + 3)
    assert weights.dtype == np.float32 and weights.shape == (len(words) + 3,)

    def weighs(text: str) -> list[float]:
        return [float(weights[token]) for token in words(text, add_special_tokens=False)["input_ids"]]

    for text in ("the", " The", " and", " was", ".", " (", "\n", ", ", "?!"):
        assert not any(weighs(text)), text
    for text in (" city", "City", " 1984", "7"):
        assert all(weighs(text)), text
    assert set(weights.tolist()) == {0.0, 1.0}
    assert 0.8 < weights.mean() < 1.0


def test_parts_of_characters_are_no_punctuation(words: PreTrainedTokenizerFast) -> None:
    weights = without_stop_words(words, stop_words("korean"), len(words))
    tokens = words("대한민국", add_special_tokens=False)["input_ids"]
    assert any("\N{REPLACEMENT CHARACTER}" in words.decode([token]) for token in tokens)
    assert weights[tokens].all()


def test_an_unknown_language_is_said_before_any_work(base: Path, corpus: Path, tmp_path: Path) -> None:
    config = adapt_config(base, corpus, tmp_path / "out", targets="no-stopwords", language="englisch")
    with pytest.raises(ConfigError, match=r"--language: no stop words for 'englisch' \(did you mean 'english'\?\)"):
        adapt(config)
    assert list(tmp_path.iterdir()) == []
    assert {"the", "because"} <= stop_words("english") and "der" in stop_words("german")


def test_rare_tokens_weigh_more_by_document(tmp_path: Path) -> None:
    config, store = prepared(tmp_path, targets="idf")
    tokenizer = tiny.tokenizer()
    weights = target_weights(config, tokenizer, store)
    assert weights is not None and weights.shape == store.document_frequency.shape
    ids = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in DOCUMENTS]
    for token in set.union(*ids):
        holding = sum(token in each for each in ids)
        assert weights[token] == pytest.approx(math.log(4 / (holding + 1)))
    assert weights[list(set.intersection(*ids))].tolist() == pytest.approx([0.0] * len(set.intersection(*ids)))


def test_inverse_document_frequency_is_never_negative() -> None:
    found = inverse_document_frequency(np.array([0, 1, 9, 10]), 9)
    assert found.tolist() == pytest.approx([math.log(10), math.log(5), 0.0, 0.0])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("targets", "text", "reason"),
    [
        ("idf", "the sky is blue", "every token stands in every document"),
        ("no-stopwords", "it is, and he was not.", "every token is a stop word or punctuation"),
    ],
)
def test_a_corpus_without_a_token_to_name_is_refused(
    tmp_path: Path, words: PreTrainedTokenizerFast, targets: str, text: str, reason: str
) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [{"_id": "1", "text": text}])
    config = adapt_config(Path("base"), corpus, tmp_path / "out", min_chunk_length=1, targets=targets)
    store = prepare_chunks(tmp_path / "chunks", config, tiny.model(words=words))
    told = f"c.jsonl: {reason}, so --targets {targets} leaves none; take --targets unique"
    with pytest.raises(DataError, match=re.escape(told)):
        target_weights(config, words, store)


def test_language_modelling_has_no_targets_to_weigh(tmp_path: Path) -> None:
    config, store = prepared(tmp_path, objective="lm")
    assert config.targets == "no-stopwords"
    assert target_weights(config, tiny.tokenizer(), store) is None


@pytest.mark.parametrize("targets", ["no-stopwords", "idf"])
def test_a_model_is_trained_with_weighted_targets(base: Path, tmp_path: Path, targets: str) -> None:
    corpus = write_text(tmp_path / "c.jsonl", documents=30)
    log = adapt(adapt_config(base, corpus, tmp_path / "out", targets=targets, steps=2)).log
    plain = adapt(adapt_config(base, corpus, tmp_path / "plain", targets="unique", steps=2)).log
    assert math.isfinite(log["loss_ebae"]) and log["loss_ebae"] != plain["loss_ebae"]
