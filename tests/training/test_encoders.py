"""Encoders through the whole path: fine-tuned, saved, encoded, searched, evaluated and planned, but never adapted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara.config import EncodeConfig, EvaluateConfig, IndexConfig, ModelConfig, SearchConfig, VerifyConfig
from llara.encoding.encode import encode
from llara.errors import ConfigError, ModelError
from llara.evaluate import evaluate
from llara.index.build import build_index
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.plan.config import PlanEncodeConfig, PlanIndexConfig
from llara.plan.jobs import plan_encode, plan_index
from llara.reranker import Reranker
from llara.retriever import Retriever
from llara.search import search
from llara.training import final
from llara.training import finetune as finetune_module
from llara.training.adapt import adapt
from llara.training.contrast import ContrastModule
from llara.training.finetune import finetune
from llara.training.lora import merge_lora
from llara.verify import verify
from tests import tiny, tiny_encoder, tiny_reranker
from tests.reference import encoders as slow
from tests.training.helpers import adapt_config, finetune_config, sentence, weights, write_lines

FAMILIES = {"bert": "cls", "roberta": "e5", "distilbert": "retromae", "modernbert": "mean", "t5": "mean"}
TEXTS = ["the sky is blue", "read a file line by line and close it", *tiny.TEXT]
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Gives the published folder of a family; T5's has a projection, as GTR has."""
    root = tmp_path_factory.mktemp("encoders")

    def make(family: str) -> Path:
        if (root / family).exists():
            return root / family
        made = tiny_encoder.save_encoder(root / family, family)
        if family == "t5":
            dense = {"linear.weight": torch.randn(24, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))}
            tiny_encoder.add_modules(made, {"pooling_mode": "mean"}, dense=dense)
        return made

    return make


def rows(count: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"query": f"{sentence(rng, 3)} {i}", "pos": [f"{sentence(rng, 8)} {i * 7}"]} for i in range(count)]


def vectors(model: EmbeddingModel) -> torch.Tensor:
    return torch.cat([model.encode(TEXTS, "query"), model.encode(TEXTS, "passage")])


def load(path: Path, **settings: Any) -> EmbeddingModel:
    return load_model(ModelConfig(model=str(path), device="cpu", **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_are_trained_and_come_back(family: str, folder: Folders, tmp_path: Path) -> None:
    base, template = folder(family), FAMILIES[family]
    train = write_lines(tmp_path / "train.jsonl", rows())
    config = finetune_config(base, train, tmp_path / "out", steps=2, template=template, warmup=0.0)
    assert finetune(config).steps == 2
    model = load(config.output, verify=True)
    assert (model.contract.template.name, model.contract.causal) == (template, False)
    assert float((vectors(model) - vectors(load(base, template=template))).abs().max()) > 1e-3
    before, after = weights(base), weights(config.output)
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert all("pooler" not in name for name in after)
    assert all("position" in name or "token_type" in name for name in same), "rows that no text reaches"
    if family != "t5":
        settings = {"length": config.passage_length, "prompt": model.contract.template.passage.prefix}
        normalise = template != "retromae"
        expected = slow.encode(config.output, TEXTS, model.contract.pooling, normalise=normalise, **settings)
        torch.testing.assert_close(model.encode(TEXTS, "passage"), expected, rtol=0, atol=2e-6 if normalise else 2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_merged_equals_unmerged(
    family: str, folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[torch.Tensor] = []

    def compare(model: EmbeddingModel, peft_model: Any) -> None:
        before = vectors(model)
        merge_lora(model, peft_model)
        assert float((vectors(model) - before).abs().max()) < 1e-5
        merged.append(before)

    monkeypatch.setattr(final, "merge_lora", compare)
    base, template = folder(family), FAMILIES[family]
    train = write_lines(tmp_path / "train.jsonl", rows())
    config = finetune_config(base, train, tmp_path / "out", steps=2, template=template, lora_rank=2, warmup=0.0)
    finetune(config)
    torch.testing.assert_close(vectors(load(config.output)), merged[0], rtol=0, atol=1e-5)
    assert float((merged[0] - vectors(load(base, template=template))).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(family: str, folder: Folders, tmp_path: Path) -> None:
    """All of it in one graph, against GradCache with a pass per row or two, and nothing kept."""
    train = write_lines(tmp_path / "train.jsonl", rows())
    found: list[dict[str, torch.Tensor]] = []

    class Stop(Exception):
        pass

    def look(module: ContrastModule, source: Any, *_: Any, **__: Any) -> Any:
        module.eval()
        passes = source.passes(0)
        assert (len(passes) > 3) if found else (len(passes) == 1)
        module.prepare(passes, module)
        count = sum(batch["counts"] for batch in passes)
        for batch in passes:
            loss, _ = module(batch, count)
            loss.backward()
        found.append({name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None})
        raise Stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune_module, "JobTrainer", look)
        for number, budget in enumerate((10**6, 40)):
            config = finetune_config(
                folder(family),
                train,
                tmp_path / str(number),
                template="mean",
                batch_size=12,
                token_budget=budget,
                graph_budget=0 if number else None,
            )
            with pytest.raises(Stop):
                finetune(config)
    whole, cut = found
    assert whole.keys() == cut.keys() and len(whole) > 10
    size = max(float(value.norm()) for value in whole.values())
    assert all(float((whole[name] - cut[name]).norm()) < 1e-5 * size for name in whole)


def test_training_finds_the_right_passages(folder: Folders, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows())
    changes: dict[str, Any] = {"steps": 60, "batch_size": 12, "learning_rate": 3e-3, "template": "mean"}
    config = finetune_config(folder("roberta"), train, tmp_path / "out", **changes)
    finetune(config)
    retriever = Retriever.load(str(config.output), device="cpu")
    scores = (
        retriever.encode_queries([row["query"] for row in rows()])
        @ retriever.encode_passages([row["pos"][0] for row in rows()]).T
    )
    assert float((scores.argmax(axis=1) == np.arange(12)).mean()) > 0.9


def test_gradient_checkpointing_changes_nothing(folder: Folders, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows())
    made = []
    for on in (False, True):
        config = finetune_config(
            folder("bert"), train, tmp_path / str(on), steps=2, template="e5", gradient_checkpointing=on
        )
        made.append(vectors(load(finetune(config).output)))
    torch.testing.assert_close(*made, rtol=0, atol=1e-5)


# Used


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_encoded_searched_and_evaluated_like_any_other(family: str, folder: Folders, tmp_path: Path) -> None:
    base, data = folder(family), rows()
    corpus = write_lines(
        tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": row["pos"][0]} for i, row in enumerate(data)]
    )
    queries = write_lines(
        tmp_path / "queries.jsonl", [{"_id": f"q{i}", "text": row["pos"][0]} for i, row in enumerate(data)]
    )
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(len(data))))
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\npooling = "mean"\n[query]\nprefix = "Q: "\n[passage]\nprefix = "Q: "\n')
    template = None if family == "t5" else str(own)
    common = {"model": str(base), "device": "cpu", "offline": True}
    encode(EncodeConfig(**common, template=template, corpus=(corpus,), output=tmp_path / "vectors", shard_size=5))
    assert "all the same" in verify(VerifyConfig(path=tmp_path / "vectors")).vectors
    build_index(IndexConfig(vectors=tmp_path / "vectors", output=tmp_path / "index"))
    # The index says which model made it, and by which template: it need not even be there any more.
    own.unlink()
    found = search(
        SearchConfig(
            index=tmp_path / "index", queries=queries, output=tmp_path / "run.trec", device="cpu", offline=True
        )
    )
    assert found.queries == len(data)
    measured = evaluate(EvaluateConfig(run=(tmp_path / "run.trec",), qrels=qrels, metrics=("RR@10",)))
    (means,) = measured.means.values()
    assert means["RR@10"] > 0.9
    asked = SearchConfig(index=tmp_path / "index", query="why", template="cls", device="cpu", offline=True)
    if family == "roberta":
        with pytest.raises(ModelError, match=r"contract\.normalise|contract\.pooling was 'mean', is 'cls'"):
            search(asked)


def test_plans_of_an_encoder(folder: Folders, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"_id": str(i), "text": each} for i, each in enumerate(TEXTS)])
    common = {"model": str(folder("roberta")), "corpus": (corpus,), "device": "cpu", "offline": True}
    plan = plan_encode(PlanEncodeConfig(**common, template="e5", calibrate=0.01, fleet="1xL4"))
    assert plan.seconds is not None and plan.amounts["documents"] == len(TEXTS)
    assert plan.fleet is not None and plan.fleet.operations > 0
    assert plan_encode(PlanEncodeConfig(**common, template="e5", calibrate=0.0)).seconds is None
    indexed = plan_index(
        PlanIndexConfig(model=str(folder("t5")), corpus=(corpus,), output=tmp_path / "i", offline=True)
    )
    assert indexed.disk["vectors"] == 4 * 24 * len(TEXTS)


# Refused


@pytest.mark.parametrize("saved", [True, False])
def test_an_encoder_is_not_adapted(saved: bool, folder: Folders, corpus: Path, tmp_path: Path) -> None:
    base = folder("bert")
    if saved:
        base = tmp_path / "saved"
        tiny_encoder.model("bert").save(base)
    config = adapt_config(base, corpus, tmp_path / "out", template=None if saved else "cls")
    with pytest.raises(
        ModelError, match=r"is an encoder, so it has no causal LM head, which adaptation projects through"
    ):
        adapt(config)
    assert not list(tmp_path.glob("out*"))


def test_an_encoder_without_a_template_is_not_trained(folder: Folders, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows())
    with pytest.raises(ModelError, match=r"is an encoder \(bert\), .*--template e5, bge, retromae, cls, mean"):
        finetune(finetune_config(folder("bert"), train, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_saved_encoder_may_be_trained_under_another_template(
    folder: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_lines(tmp_path / "train.jsonl", rows())
    tiny_encoder.model("bert").save(tmp_path / "base")
    config = finetune_config(tmp_path / "base", train, tmp_path / "out", template="cls", steps=1)
    contract = load(finetune(config).output).contract
    assert (contract.template.name, contract.pooling) == ("cls", "cls")
    assert "was saved with other settings; now template cls" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'paper' is for causal decoders"):
        finetune(finetune_config(tmp_path / "base", train, tmp_path / "other", template="paper"))


def test_retrievers_and_rerankers_are_not_taken_for_each_other(folder: Folders, tmp_path: Path) -> None:
    tiny_encoder.model("bert").save(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"saved: is a retriever, .* and not a reranker"):
        Reranker.load(str(tmp_path / "saved"), device="cpu")
    with pytest.raises(ModelError, match=r"BertForSequenceClassification is no decoder with a score head"):
        Reranker.load(str(folder("bert")), device="cpu")
    tiny_reranker.reranker().save(tmp_path / "reranker")
    with pytest.raises(ModelError, match=r"reranker: is a reranker, .* and not a retriever"):
        load(tmp_path / "reranker", template="cls")
    config = json.loads((folder("bert") / "config.json").read_text())
    (tmp_path / "cross").mkdir()
    changed = {**config, "architectures": ["BertForSequenceClassification"]}
    (tmp_path / "cross" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"cross: is a reranker, .* and not a retriever"):
        load(tmp_path / "cross", template="cls")
