"""Fine-tuning: what a batch holds, what is trained, and what the model folder says afterwards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara.config import FinetuneConfig
from llara.data import read_examples
from llara.errors import ConfigError, DataError
from llara.model import EmbeddingModel
from llara.retriever import Retriever
from llara.training.finetune import finetune, freeze_head
from tests import tiny
from tests.training.helpers import finetune_config, sentence, weights, write_lines

PAIRS = 24


def toy_rows() -> list[dict[str, Any]]:
    """Queries whose words say nothing of their passages: only training can tell which belongs to which."""
    rng = np.random.default_rng(0)
    return [{"query": f"{sentence(rng, 3)} {i}", "pos": [f"{sentence(rng, 8)} {i * 7}"]} for i in range(PAIRS)]


def recall(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Returns the share of queries that find their own passage first."""
    retriever = Retriever.load(str(folder), device="cpu")
    queries = retriever.encode_queries([row["query"] for row in rows])
    passages = retriever.encode_passages([row["pos"][0] for row in rows])
    return float(((queries @ passages.T).argmax(axis=1) == np.arange(len(rows))).mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> FinetuneConfig:
    """A finished run over the toy pairs."""
    folder = tmp_path_factory.mktemp("trained")
    train = write_lines(folder / "train.jsonl", toy_rows())
    config = finetune_config(
        base, train, folder / "out", steps=60, batch_size=12, log_every=10, query_length=24, passage_length=48
    )
    finetune(config)
    return config


def test_training_finds_the_right_passages(trained: FinetuneConfig, base: Path) -> None:
    lines = [json.loads(line) for line in (trained.output / "training_log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_contrast"] < 0.3 * lines[0]["loss_contrast"]
    before, after = recall(base, toy_rows()), recall(trained.output, toy_rows())
    assert before < 0.5
    assert after > 0.9


def test_an_untied_head_stays_as_it_is(trained: FinetuneConfig, base: Path) -> None:
    before, after = weights(base), weights(trained.output)
    assert before.keys() == after.keys()
    assert before["lm_head.weight"].numpy().tobytes() == after["lm_head.weight"].numpy().tobytes()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_only_an_untied_head_is_frozen(tied: bool) -> None:
    model = tiny.model(tie_word_embeddings=tied)
    freeze_head(model)
    frozen = {name for name, value in model.lm.named_parameters() if not value.requires_grad}
    assert frozen == (set() if tied else {"lm_head.weight"})  # so no checkpoint holds what does not change


def test_lengths_are_part_of_the_contract(trained: FinetuneConfig) -> None:
    contract = Retriever.load(str(trained.output), device="cpu").model.contract
    assert (contract.query_length, contract.passage_length) == (24, 48)


def test_lengths_come_from_the_model_folder_where_none_are_given(trained: FinetuneConfig, tmp_path: Path) -> None:
    config = replace(
        trained, model=str(trained.output), output=tmp_path / "out", steps=1, query_length=None, passage_length=32
    )
    contract = Retriever.load(str(finetune(config).output), device="cpu").model.contract
    assert (contract.query_length, contract.passage_length) == (24, 32)


@pytest.mark.parametrize("titles", [True, False])
def test_titles_are_switched_once_for_all(base: Path, tmp_path: Path, titles: bool) -> None:
    rows = [{"query": f"read {i}", "pos": [{"title": f"Title {i}", "text": f"a file {i}"}]} for i in range(4)]
    train = write_lines(tmp_path / "train.jsonl", rows)
    config = finetune_config(base, train, tmp_path / "out", steps=1, titles=titles, passage_length=64)
    retriever = Retriever.load(str(finetune(config).output), device="cpu")
    assert (retriever.model.contract.title_separator is None) == (not titles)
    with_title = retriever.encode_passages(["a file"], titles=["The sky"])
    assert np.allclose(with_title, retriever.encode_passages(["a file"])) == (not titles)
    joined = retriever.encode_passages(["The sky a file"])
    assert np.allclose(with_title, joined, atol=1e-6) == titles


def test_a_tied_head_moves_with_the_embeddings(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tie_word_embeddings=True)
    train = write_lines(tmp_path / "train.jsonl", toy_rows()[:6])
    made = finetune(finetune_config(base, train, tmp_path / "out", steps=2)).output
    model = Retriever.load(str(made), device="cpu").model
    head, table = model.lm.get_output_embeddings().weight, model.lm.get_input_embeddings().weight
    assert head.data_ptr() == table.data_ptr()
    assert not torch.equal(table.detach(), weights(base)["model.embed_tokens.weight"])


@pytest.mark.parametrize("template", ["repllama", "release"])
def test_lora_and_other_templates(base: Path, tmp_path: Path, template: str) -> None:
    train = write_lines(tmp_path / "train.jsonl", toy_rows()[:6])
    config = finetune_config(
        base, train, tmp_path / "out", steps=2, template=template, lora_rank=2, query_length=100, passage_length=100
    )
    retriever = Retriever.load(str(finetune(config).output), device="cpu", verify=True)
    assert retriever.model.contract.template.name == template
    before, after = weights(base), weights(config.output)
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"][: len(before["lm_head.weight"])])
    added = 16 if template == "release" else 0
    assert len(after["model.embed_tokens.weight"]) == len(before["model.embed_tokens.weight"]) + added
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"]
    )


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "pos": []}', r"train.jsonl:2: pos is empty"),
        ('{"query": "q"}', r"train.jsonl:2: no field pos"),
        ('{"query": " ", "pos": ["p"]}', r"train.jsonl:2: .*query"),
        ('{"query": "q", "pos": ["p"], "neg": ["p"]}', r"train.jsonl:2: neg\[0\] is also a positive"),
        ('{"query": "q", "pos": ["p"]', r"train.jsonl:2: "),
    ],
)
def test_bad_examples_are_refused_before_the_first_step_and_can_be_mended(
    base: Path, tmp_path: Path, line: str, message: str
) -> None:
    train = tmp_path / "train.jsonl"
    good = '{"query": "q", "pos": ["p"], "neg": ["n"]}\n'
    train.write_text(good + line + "\n")
    config = finetune_config(base, train, tmp_path / "out", steps=1, batch_size=1)
    with pytest.raises(DataError, match=message):
        finetune(config)
    assert not config.output.exists()
    assert not (tmp_path / "out.partial" / "log.jsonl").exists()
    train.write_text(good)
    assert finetune(config).steps == 1


def test_lengths_without_room_for_text_are_refused_and_can_be_mended(base: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", toy_rows()[:4])
    with pytest.raises(ConfigError, match="a query length of 3 tokens leaves no room for text"):
        finetune(finetune_config(base, train, tmp_path / "out", query_length=3))
    assert finetune(finetune_config(base, train, tmp_path / "out", steps=1)).output.is_dir()


def test_a_single_step_learns_although_the_rate_begins_at_zero(base: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", toy_rows()[:4])
    made = finetune(finetune_config(base, train, tmp_path / "out", steps=1, warmup=0.1)).output
    before, after = weights(base)["model.embed_tokens.weight"], weights(made)["model.embed_tokens.weight"]
    assert not torch.equal(before, after)


def test_held_out_examples_that_cannot_tell_steps_apart_are_refused(base: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", toy_rows()[:4])
    passage = toy_rows()[0]["pos"]
    dev = write_lines(tmp_path / "dev.jsonl", [{"query": "read", "pos": passage}])
    config = finetune_config(base, train, tmp_path / "out", steps=1, dev=(dev,), dev_passages=1)
    with pytest.raises(DataError, match=r"dev\.jsonl: each passage is relevant to each held-out query"):
        finetune(config)
    assert finetune(replace(config, dev_passages=3)).steps == 1


def test_a_collection_is_trained_on_its_split(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"a file {i}"} for i in range(4)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"read {i}"} for i in range(4)])
    for split, number in (("train", 0), ("dev", 1)):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in (number, number + 2))]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    assert [item.query for item in read_examples([folder], "dev")] == ["read 1", "read 3"]
    result = finetune(finetune_config(base, folder, tmp_path / "out", steps=None, epochs=2, batch_size=2, split="dev"))
    assert result.steps == 2
    assert isinstance(Retriever.load(str(result.output), device="cpu").model, EmbeddingModel)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_rows_of_new_tokens(tied: bool, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tie_word_embeddings=tied)
    train = write_lines(tmp_path / "train.jsonl", toy_rows())
    outputs = []
    for steps in (1, 6):
        config = finetune_config(
            base, train, tmp_path / f"out{steps}", template="release", lora_rank=2, steps=steps, warmup=0.0
        )
        finetune(config)
        outputs.append(Retriever.load(str(config.output), device="cpu").model)
    ids = outputs[0].tokenizer.convert_tokens_to_ids([f"<s{i}>" for i in range(1, 17)])
    first, last = (model.lm.get_input_embeddings().weight[ids] for model in outputs)
    assert bool(((first - last).abs().amax(dim=1) > 1e-4).all())


def test_a_saved_model_may_get_a_template_without_branches(
    trained: FinetuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finetune_config(trained.output, trained.train[0], tmp_path / "out", template="repllama", steps=1)
    finetune(config)
    assert "was saved with other settings; now template repllama" in capsys.readouterr().err
    assert Retriever.load(str(config.output), device="cpu").model.contract.template.name == "repllama"


def test_lengths_beyond_the_positions_are_refused_before_training(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", "gpt2", n_positions=64)
    train = write_lines(tmp_path / "train.jsonl", toy_rows())
    config = finetune_config(base, train, tmp_path / "out", passage_length=65)
    with pytest.raises(ConfigError, match="a passage length of 65 tokens is more than the 64 positions"):
        finetune(config)
    finetune(replace(config, passage_length=64, steps=1))
