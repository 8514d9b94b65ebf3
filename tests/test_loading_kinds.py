"""Models that are no causal decoder, or not this tokenizer's, are refused by what they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, BertModel, LlamaModel

from llara.config import ModelConfig
from llara.errors import ModelError
from llara.loading import load_model
from llara.model import EmbeddingModel
from tests import tiny
from tests.folders import load


def save_bert(folder: Path, kind: Any = BertLMHeadModel, **changes: Any) -> Path:
    words = tiny.tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    kind(BertConfig(vocab_size=len(words), **sizes, **changes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [BertLMHeadModel, BertModel])
@pytest.mark.parametrize("weights", [True, False])
def test_an_encoder_is_refused_by_its_name(tmp_path: Path, kind: Any, weights: bool) -> None:
    folder = save_bert(tmp_path / "bert", kind)
    with pytest.raises(ModelError, match=r"bert: is an encoder \(bert\), whose positions see what stands after them;"):
        load_model(ModelConfig(model=str(folder)), weights=weights)


def test_an_encoder_made_a_decoder_is_one(tmp_path: Path) -> None:
    model = load(save_bert(tmp_path / "bert", is_decoder=True))
    assert model.encode(["the sky is blue"], "query").shape == (1, 32)


def test_an_encoder_by_any_other_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a decoder that was made to look both ways."""
    folder = tiny.save_base(tmp_path / "base")
    trunk = EmbeddingModel.trunk

    def both_ways(self: EmbeddingModel, **inputs: Any) -> torch.Tensor:
        states = trunk(self, **inputs)
        return states + states.mean(dim=1, keepdim=True)

    monkeypatch.setattr(EmbeddingModel, "trunk", both_ways)
    with pytest.raises(
        ModelError, match=r"base: its positions see what stands after them \(difference .*\), as an enc"
    ):
        load(folder)


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_every_decoder_is_one(family: str, tmp_path: Path) -> None:
    load(tiny.save_base(tmp_path / "base", family))


def test_a_decoder_without_its_head_is_no_encoder(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    LlamaModel(tiny.config("llama", len(words))).save_pretrained(tmp_path / "trunk")
    words.save_pretrained(tmp_path / "trunk")
    assert not load(tmp_path / "trunk").has_head


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    tiny.language_model("llama", 100).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    message = (
        rf"base: its tokenizer has {len(words)} tokens and its embeddings have 100 rows, so it is not the tokenizer"
    )
    for changes in ({}, {"for_training": True}):
        with pytest.raises(ModelError, match=message):
            load_model(ModelConfig(model=str(tmp_path / "base")), **changes)  # type: ignore[arg-type]


def test_special_tokens_beyond_the_embeddings_are_no_fault_where_nothing_uses_them(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has a token for images that the models for text have no row for."""
    folder = tiny.save_base(tmp_path / "base")
    words = tiny.tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    words.save_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert len(words) == rows + 1
    assert load(folder).encode(["an <image> of the sky"], "query").shape == (1, tiny.HIDDEN)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), torch.nn.Module)
