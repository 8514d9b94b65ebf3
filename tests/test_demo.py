"""The whole job, at a size that takes seconds."""

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llara import demo as demo_module
from llara.cli import main
from llara.config import DemoConfig
from llara.data import read_documents, read_qrels, read_queries, read_run
from llara.data.docstrings import DocstringRow
from llara.data.splits import split_by_module
from llara.demo import ARMS, METRICS, DemoResult, Size, demo, write_data
from llara.errors import StorageError
from llara.evaluate import Comparison, Evaluation
from llara.training.trainer import JobTrainer

TINY = Size(pairs=16, queries=8, chunks=16, packages=("email", "logging"))


def rows(count: int) -> list[DocstringRow]:
    """Rows of made-up modules; the words of a row occur in no other."""
    made = []
    for number in range(count):
        module = f"package.module{number // 3}"
        body = " ".join(f"body{number}word{position}" for position in range(16))
        made.append(DocstringRow(f"{module}:f{number}", module, "package", f"Summary number {number} of all.", body))
    return sorted(made)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(demo_module, "read_docstrings", lambda packages, progress: rows(240))
    yield tmp_path / "data"


def test_the_sample_follows_size_and_split(data: Path) -> None:
    count = write_data(data, Size(pairs=30, queries=7, chunks=None), seed=0)
    assert count == 30 + 7 + 7 == len(list(read_documents([data])))
    for split, expected in (("train", 30), ("dev", 7), ("test", 7)):
        qrels = read_qrels(data, split)
        assert len(qrels) == expected
        assert {split_by_module(qrel.document_id.partition(":")[0]) for qrel in qrels} == {split}
        assert all(qrel.query_id == f"q-{qrel.document_id}" for qrel in qrels)


def test_no_text_of_dev_or_test_is_trained_on(data: Path) -> None:
    write_data(data, Size(pairs=None, queries=None, chunks=None), seed=0)
    text = (data / "text.jsonl").read_text(encoding="utf-8")
    documents = {document.id: document.text for document in read_documents([data])}
    for split in ("train", "dev", "test"):
        for query in read_queries(data, split):
            inside = split == "train"
            assert (query.text in text) == inside
            assert (documents[query.id.removeprefix("q-")] in text) == inside


def test_seed_and_size_decide_the_sample(data: Path, tmp_path: Path) -> None:
    size = Size(pairs=30, queries=7, chunks=None)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_data(tmp_path / name, size, seed)
    contents = [(tmp_path / name / "corpus.jsonl").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]
    before = (tmp_path / "a" / "summary.json").stat().st_mtime_ns
    assert write_data(tmp_path / "a", size, 1) == 44
    assert (tmp_path / "a" / "summary.json").stat().st_mtime_ns == before


def test_a_killed_preparation_is_done_again(data: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-data"
    (leftover / "qrels").mkdir(parents=True)
    (leftover / "qrels" / "odd.tsv").write_text("left by a killed run")
    write_data(data, Size(pairs=30, queries=7, chunks=None), seed=0)
    assert not leftover.exists()
    assert sorted(path.name for path in (data / "qrels").iterdir()) == ["dev.tsv", "test.tsv", "train.tsv"]


@contextlib.contextmanager
def counted_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Counts the training runs that are started."""
    started: list[str] = []
    original = JobTrainer.run

    def run(self: JobTrainer) -> Any:
        started.append(self.watcher.label)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(JobTrainer, "run", run)
        yield started


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Makes the fast demo take two steps per stage."""
    patch.setitem(demo_module.SIZES, "fast", TINY)
    patch.setitem(demo_module.FINETUNE, "batch_size", 8)
    patch.setitem(demo_module.ADAPT, "batch_size", 8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DemoResult, list[str]]]:
    """The demo's result, and the training runs that it took."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        with counted_training(patch) as started:
            result = demo(DemoConfig(output=tmp_path_factory.mktemp("demo") / "out", fast=True))
        yield result, started


def test_the_table_compares_four_systems(finished: tuple[DemoResult, list[str]]) -> None:
    result, started = finished
    assert started == ["finetune", "adapt (lm)", "finetune", "adapt (ebae+ebar)", "finetune"]
    text = result.to_text()
    for name in (*ARMS, "bm25"):
        assert name in text
        hits = read_run(result.output / name / f"{name}.trec")
        assert hits.keys() == {query.id for query in read_queries(result.output / "data", "test")}
    values = result.to_json()
    assert json.loads(json.dumps(values)) == values
    assert result.documents == len(list(read_documents([result.output / "data"])))
    assert str(result.output) in text
    evaluation = json.loads((result.output / "evaluation.json").read_text())
    assert all(metric in json.dumps(evaluation) for metric in METRICS)
    assert {"documentation strings", "BM25", "evaluate"} < result.seconds.keys()
    assert 0 < result.peak_gigabytes < 4


def test_no_test_text_is_adapted_on(finished: tuple[DemoResult, list[str]]) -> None:
    data = finished[0].output / "data"
    text = [json.loads(line)["text"] for line in (data / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    bodies = {document.id: document.text for document in read_documents([data])}
    test = read_qrels(data, "test")
    assert test
    for qrel in test:
        assert not any(bodies[qrel.document_id] in entry for entry in text)
    assert len(text) == len(read_qrels(data, "train"))


def test_the_command_it_prints_finds_something(
    finished: tuple[DemoResult, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # `main` sets it for good
    words = shlex.split(finished[0].next_command)
    assert words[words.index("search") - 1].endswith("llara")
    assert main(words[words.index("search") :]) == 0
    printed = capsys.readouterr().out
    ids = {document.id for document in read_documents([finished[0].output / "data"])}
    assert sum(name in printed for name in ids) >= 5


def test_a_second_run_reuses_everything(
    finished: tuple[DemoResult, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = finished[0]
    before = {path: path.stat().st_mtime_ns for path in first.output.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in first.output.rglob("vectors/shard-?????.npy")}
    shrink(monkeypatch)
    with counted_training(monkeypatch) as started:
        again = demo(DemoConfig(output=first.output, fast=True))
    assert started == []
    assert again.evaluation.to_json() == first.evaluation.to_json()
    assert len(before) == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_mode_or_folder_is_refused(finished: tuple[DemoResult, list[str]], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match='mode was "fast", is now "default"'):
        demo(DemoConfig(output=finished[0].output))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not made by llara"):
        demo(DemoConfig(output=tmp_path))


@pytest.mark.parametrize(
    ("difference", "p_value", "words"),
    [
        (0.03, 0.01, "adaptation helps"),
        (-0.03, 0.01, "adaptation hurts"),
        (0.03, 0.2, "adaptation makes no difference"),
    ],
)
def test_the_table_says_whether_adaptation_helps(difference: float, p_value: float, words: str) -> None:
    low, high = difference - 0.02, difference + 0.02
    other = Comparison("lm+finetuned", "finetuned", "nDCG@10", -1.0, -1.0, -1.0, 0.0)
    found = Comparison("adapted+finetuned", "finetuned", "nDCG@10", difference, low, high, p_value)
    evaluation = Evaluation(("nDCG@10",), (), (), {}, {}, (other, found), {}, {})
    verdict = DemoResult(Path("demo"), evaluation, 3).verdict
    assert words in verdict
    assert f"{difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}" in verdict
