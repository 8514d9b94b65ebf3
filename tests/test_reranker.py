"""Rerankers: scores beside those of transformers, what a folder promises, and which folders are none."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from llara.config import ModelConfig, VerifyConfig
from llara.contract import read_record
from llara.errors import ConfigError, ModelError, StorageError
from llara.loading import load_model
from llara.pairs import RANKLLAMA_V1
from llara.reranker import Reranker, load_reranker
from llara.verify import verify
from tests import tiny
from tests.kept import refuse_kept
from tests.tiny_reranker import classifier, reranker, save_adapter, save_published

QUERIES = ["why is the sky blue", "read a file", "why is the sky blue", "x"]
DOCUMENTS = ["Air scatters short wavelengths.", "Close the file when the last line is read. " * 3, "No.", "A model"]


def opened(folder: Path, **settings: Any) -> Reranker:
    return Reranker.load(str(folder), device="cpu", offline=True, **settings)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_are_those_of_transformers_one_row_at_a_time(family: str) -> None:
    model = reranker(family)
    rows = model.bind().rows(QUERIES, DOCUMENTS)
    with torch.inference_mode():
        expected = [model.lm(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert len({round(score, 3) for score in expected}) == len(expected)
    for budget in (None, 1, 70):
        seen: list[int] = []
        found = model.score(QUERIES, DOCUMENTS, token_budget=budget, on_batch=seen.append)
        assert found.dtype == np.float32 and found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert sum(seen) == 4
    assert model.score([], []).shape == (0,)


def test_titles_are_joined_as_the_contract_says() -> None:
    model = reranker()
    with_titles = model.score(["why"], ["blue sky"], ["Light"])
    assert with_titles.tolist() == model.score(["why"], ["Light blue sky"]).tolist()
    assert reranker(title_separator=None).score(["why"], ["blue sky"], ["Light"]) != with_titles
    for wrong in ((["a"], ["b", "c"]), ("a", ["b"]), (["a"], ["b"], [])):
        with pytest.raises(ConfigError):
            model.score(*wrong)  # type: ignore[arg-type]


def test_a_saved_reranker_scores_as_before(tmp_path: Path) -> None:
    model = reranker(template=RANKLLAMA_V1, title_separator=None, length=50)
    model.save(tmp_path / "model", {"note.txt": "kept"})
    again = opened(tmp_path / "model", verify=True)
    assert again.contract == model.contract
    assert again.score(QUERIES, DOCUMENTS).tolist() == model.score(QUERIES, DOCUMENTS).tolist()
    assert (tmp_path / "model" / "note.txt").read_text() == "kept"
    assert again.fingerprint == opened(tmp_path / "model").fingerprint
    with pytest.raises(ConfigError, match=r"--template: .* was saved with template 'rankllama-v1' and BOS yes"):
        opened(tmp_path / "model", template="rankllama")
    longer = load_reranker(ModelConfig(model=str(tmp_path / "model"), device="cpu"), length=40)
    assert (longer.contract.query_length, longer.contract.length) == (20, 40)
    with pytest.raises(ConfigError, match="600 tokens is more than the 512"):
        load_reranker(ModelConfig(model=str(tmp_path / "model"), device="cpu"), length=600)


@pytest.mark.parametrize("pad", [True, False])
def test_a_saved_reranker_opens_in_transformers_with_the_same_scores(tmp_path: Path, pad: bool) -> None:
    model = reranker("gpt2")
    if not pad:  # padding by EOS, which transformers would take the last token for
        model.tokenizer.pad_token = model.tokenizer.eos_token
    model.save(tmp_path / "model")
    lm = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    for query, document, score in zip(QUERIES, DOCUMENTS, model.score(QUERIES, DOCUMENTS).tolist(), strict=True):
        rows = torch.tensor(model.bind().rows([query], [document]))
        assert lm(input_ids=rows).logits.item() == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_what_was_changed_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reranker().save(folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] *= 1.1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="do not give the scores they gave when saved"):
        opened(folder)
    with pytest.raises(StorageError, match=r"model\.safetensors: is damaged"):
        opened(folder, verify=True)
    record = json.loads((folder / "llara.json").read_text())
    record["contract"]["length"] = 70
    (folder / "llara.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="was changed after it was saved"):
        opened(folder)


def test_a_saved_reranker_is_verified(tmp_path: Path) -> None:
    reranker().save(tmp_path / "model")
    report = verify(VerifyConfig(path=tmp_path / "model"))
    assert report.kind == "reranker" and report.vectors == "gives the 3 scores it gave when saved"
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"tokenizer_config\.json: is damaged"):
        verify(VerifyConfig(path=tmp_path / "model"))


def test_a_published_checkpoint_loads_with_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_published(tmp_path / "model")
    model = opened(tmp_path / "model", template="rankllama-v1")
    assert model.contract.template == RANKLLAMA_V1 and model.contract.bos
    assert "no llara.json in the folder; using template rankllama-v1" in capsys.readouterr().err
    expected = reranker(template=RANKLLAMA_V1, query_length=64, length=256).score(QUERIES, DOCUMENTS)
    assert model.score(QUERIES, DOCUMENTS).tolist() == expected.tolist()


def test_an_adapter_over_a_base_model(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    peft_model = save_adapter(tmp_path / "adapter", base)
    model = opened(tmp_path / "adapter")
    rows = model.bind().rows(QUERIES, DOCUMENTS)
    with torch.inference_mode():
        expected = [peft_model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert model.score(QUERIES, DOCUMENTS).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    before = model.fingerprint
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"this is the base model of the adapter .*, give another place with --base"):
        opened(tmp_path / "adapter")
    config = ModelConfig(model=str(tmp_path / "adapter"), device="cpu")
    assert load_reranker(config, base=str(tmp_path / "moved")).fingerprint == before


def test_an_adapter_that_is_no_reranker(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".score." in name for name in weights)
    save_file(
        {name: weight for name, weight in weights.items() if ".score." not in name},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match="holds no score head, and its base model has none"):
        opened(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors; pickled weights are not read"):
        opened(tmp_path / "adapter")


def test_a_retriever_is_no_reranker_and_the_reverse(tmp_path: Path) -> None:
    tiny.model().save(tmp_path / "retriever")
    with pytest.raises(ModelError, match=r"retriever: is a retriever, which makes .*, and not a reranker"):
        opened(tmp_path / "retriever")
    with pytest.raises(
        ModelError, match=r"base: has no score head, so it is no reranker; make one with: llara finetune"
    ):
        opened(tiny.save_base(tmp_path / "base"))
    reranker().save(tmp_path / "reranker")
    save_published(tmp_path / "published")
    for name in ("reranker", "published"):
        with pytest.raises(ModelError, match=rf"{name}: is a reranker, which scores .*, and not a retriever"):
            load_model(ModelConfig(model=str(tmp_path / name), device="cpu"))


def test_any_decoder_can_be_trained_into_one(tmp_path: Path) -> None:
    tiny.model().save(tmp_path / "retriever")
    reranker(length=44).save(tmp_path / "reranker")
    for folder, length in (
        (tmp_path / "retriever", 256),
        (tiny.save_base(tmp_path / "base"), 256),
        (tmp_path / "reranker", 44),
    ):
        torch.manual_seed(3)
        model = load_reranker(ModelConfig(model=str(folder), device="cpu"), for_training=True)
        assert model.contract.length == length
        assert np.isfinite(model.score(QUERIES, DOCUMENTS)).all()
    assert read_record(tmp_path / "reranker", "llara-reranker") is not None


def test_other_classifiers_are_refused(tmp_path: Path) -> None:
    save_published(tmp_path / "two", labels=2)
    with pytest.raises(ModelError, match="two: "):
        opened(tmp_path / "two")
    small = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=400, num_labels=1
    )
    BertForSequenceClassification(small).save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="BertForSequenceClassification is no decoder with a score head"):
        opened(tmp_path / "bert")
    shutil.rmtree(tmp_path / "bert")
    with pytest.raises(ModelError, match="no such folder"):
        opened(tmp_path / "bert")
    (tmp_path / "bert").mkdir()
    with pytest.raises(ModelError, match=r"holds no model \(config\.json or adapter_config\.json is missing\)"):
        opened(tmp_path / "bert")


def test_gradients_reach_trunk_and_head() -> None:
    model = Reranker(classifier(), tiny.tokenizer(), reranker().contract, "x", "x")
    model.logits(model.bind().rows(QUERIES, DOCUMENTS), token_budget=40).sum().backward()
    assert model.lm.score.weight.grad.abs().sum() > 0
    assert model.lm.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_no_batch_leaves_a_block_of_its_own_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reranker("llama")
    scored = refuse_kept(monkeypatch, model, "logits_of")
    model.score(QUERIES, DOCUMENTS, token_budget=1)
    assert len(scored) == len(QUERIES)
