"""What is printed after a job: its hits or figures, and a next command that runs as it stands."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llara import files
from llara.cli.parse import config_class, field_help
from llara.cli.show import next_command, remarks, to_text
from llara.cli.table import COMMANDS
from llara.config import EncodeConfig, FinetuneConfig, IndexConfig, MineConfig, RerankConfig, SearchConfig
from llara.encoding.encode import EncodeResult
from llara.index.base import Manifest


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara.invocation._program", lambda: ["llara"])


@dataclass(frozen=True)
class Found:
    rank: int = 1
    score: float = 0.5
    id: str = "d7"
    title: str = "Rayleigh"
    text: str = "scatters blue light"


@dataclass(frozen=True)
class Result:
    output: Path | None
    answers: tuple[Found, ...] = ()
    hits: int = 0


def make_index(folder: Path, kind: str, model_path: str) -> Path:
    folder.mkdir()
    Manifest(kind, 1, {}, None, model_path, "x", "documents", {}).publish(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "model_path", "flag"),
    [
        ("flat", "org/name", " --model org/name"),
        ("flat", "mini", ""),
        ("flat", "./model", ""),
        ("flat", "./gone", " --model MODEL"),
        ("flat", "", " --model MODEL"),
        ("sparse", "./gone", " --model MODEL"),
        ("bm25", "", ""),
    ],
)
def test_a_search_names_the_model_that_its_index_does_not_lead_to(
    kind: Any, model_path: str, flag: str, tmp_path: Path
) -> None:
    folder = make_index(tmp_path / "index", kind, model_path)
    (folder / "model").mkdir()
    config = IndexConfig(output=folder, type=kind, vectors=Path("v"))
    assert next_command("index", config, None) == f"llara search 'YOUR QUESTION' --index {folder}{flag}"


def test_what_follows_a_reranker_a_reranked_run_and_mined_negatives() -> None:
    made = FinetuneConfig(model="m", train=(Path("t"),), output=Path("out"), task="rerank")
    line = "llara rerank --model out --run RUN --queries FILE --corpus PATH --output RUN"
    assert next_command("finetune", made, None) == line
    given = {"queries": Path("q"), "run": Path("first"), "output": Path("second")}
    line = "llara evaluate --run first second --qrels FILE"
    assert next_command("rerank", RerankConfig(model="m", **given), None) == line
    mined = "llara finetune --model DIR --train second --output DIR"
    assert next_command("mine", MineConfig(**given), None) == mined


def test_a_run_of_a_split_is_evaluated_on_that_split() -> None:
    run = {"index": Path("i"), "queries": Path("set"), "output": Path("run.trec")}
    line = next_command("search", SearchConfig(**run, split="dev"), None)
    assert line == "llara evaluate --run run.trec --qrels set --split dev"
    assert next_command("search", SearchConfig(**run), None) == "llara evaluate --run run.trec --qrels FILE"


@pytest.mark.parametrize("output", [None, Path("run.trec")])
def test_hits_are_rendered_with_or_without_a_run(output: Path | None) -> None:
    text = to_text(Result(output, (Found(),), 1))
    assert "Rayleigh" in text and "scatters blue light" in text and "Found(" not in text
    config = SearchConfig(query="why", index=Path("i"), output=output, model="m")
    assert next_command("search", config, None) == "llara search --model m --index i --queries FILE --output RUN"


def test_a_run_is_shown_in_figures() -> None:
    assert to_text(Result(Path("run.trec"))) == "output  run.trec\nhits    0"


def test_the_help_of_split_says_what_is_held_back() -> None:
    finetune = next(command for command in COMMANDS if command.name == "finetune")
    text = field_help(config_class(finetune))["split"]
    assert all(name in text for name in ("a fifth", "`train-all`", "SQuAD JSON has only `test`"))


def test_what_a_file_system_cannot_promise_is_said_beside_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncodeConfig(model="mini", corpus=(tmp_path,), output=tmp_path)
    result = EncodeResult(tmp_path, 4, 1, 10, 2, 0)
    bad_rows = f"2 bad rows were left out: {tmp_path / 'rejected.jsonl'} says which and why"
    monkeypatch.setattr(files, "_notes", {})
    monkeypatch.delattr(os, "posix_fallocate")  # holds for the whole system: `llara doctor` says so, once
    assert remarks(config, result) == [bad_rows]
    monkeypatch.setattr(files, "_notes", {"no folder fsync here": None})
    weaker = "this file system keeps fewer promises: no folder fsync here"
    assert remarks(config, result) == [bad_rows, weaker]
    assert remarks(config, result._replace(rejected=0)) == [weaker]
