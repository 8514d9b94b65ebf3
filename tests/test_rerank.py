"""Reranking of runs: the new order, resume to the byte, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara import rerank as rerank_module
from llara.config import RerankConfig
from llara.data import rank_hits, read_documents, read_run, write_run
from llara.errors import ConfigError, DataError, ModelError, StorageError
from llara.rerank import rerank
from llara.reranker import Reranker
from tests import tiny
from tests.reference import reranking as reference
from tests.tiny_reranker import reranker, save_adapter

WORDS = ["sky", "blue", "air", "light", "file", "line", "read", "close", "model", "text", "numbers", "why"]
QUERIES, DOCUMENTS, DEPTH = 7, 40, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rerank") / "model"
    reranker().save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    corpus = [
        {"_id": f"d{n}", "title": WORDS[n % 12] if n % 3 else "", "text": " ".join(rng.choice(WORDS, 3 + n % 14))}
        for n in range(DOCUMENTS)
    ]
    write_lines(tmp_path / "corpus.jsonl", corpus)
    write_lines(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": f"{WORDS[n]} {WORDS[-n]}?"} for n in range(9)])
    hits = {}
    for n in range(QUERIES):
        names = rng.permutation(DOCUMENTS)[:10] if n else [3]  # one query has fewer hits than the depth
        hits[f"q{n}"] = rank_hits(f"q{n}", [(f"d{name}", float(-rank)) for rank, name in enumerate(names)])
    write_run(tmp_path / "run", hits)
    return tmp_path


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, reranker: Path, **changes: Any) -> RerankConfig:
    given: dict[str, Any] = {"model": str(reranker), "device": "cpu", "offline": True, "depth": DEPTH}
    given |= {"run": folder / "run", "queries": folder / "queries.jsonl", "corpus": (folder / "corpus.jsonl",)}
    return RerankConfig(**{**given, "output": folder / "out", **changes})


def score_all(folder: Path, model: Path) -> dict[str, dict[str, float]]:
    opened = Reranker.load(str(model), device="cpu")
    documents = {each.id: each for each in read_documents([folder / "corpus.jsonl"])}
    texts = {row["_id"]: row["text"] for row in map(json.loads, (folder / "queries.jsonl").read_text().splitlines())}
    return {
        query_id: {
            hit.document_id: reference.score(opened, texts[query_id], documents[hit.document_id]) for hit in hits
        }
        for query_id, hits in read_run(folder / "run").items()
    }


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("budget", [None, 60])
def test_the_first_hits_are_reordered_and_those_below_stay(
    folder: Path, model: Path, weight: float, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank_module, "_WINDOW", 13)
    result = rerank(settings(folder, model, first_stage_weight=weight, token_budget=budget))
    scores = score_all(folder, model)
    before, found = read_run(folder / "run"), read_run(folder / "out")
    assert list(found) == list(before)
    for query_id, hits in before.items():
        expected = reference.order(hits, scores[query_id], DEPTH, weight if len(hits) > 1 else 0)
        assert [hit.document_id for hit in found[query_id]] == [name for name, _ in expected]
        if len(hits) > 1:
            got = [hit.score for hit in found[query_id]][:DEPTH]
            assert got == pytest.approx([score for _, score in expected][:DEPTH], rel=1e-4, abs=1e-5)
    assert result.queries == QUERIES and result.pairs == 1 + 6 * DEPTH and result.reused_queries == 0
    assert not (folder / "out.partial").exists() and "depth = 6" in (folder / "out.toml").read_text()


def test_depth_and_cut_are_two_things(folder: Path, model: Path) -> None:
    rerank(settings(folder, model, depth=DEPTH, output=folder / "whole"))
    rerank(settings(folder, model, depth=DEPTH, top_k=4))
    whole, cut = read_run(folder / "whole"), read_run(folder / "out")
    assert cut == {query_id: hits[:4] for query_id, hits in whole.items()}


def test_texts_come_from_a_corpus_a_collection_or_a_store(folder: Path, model: Path) -> None:
    from llara.config import IndexConfig
    from llara.index.build import build_index

    rerank(settings(folder, model, output=folder / "expected"))
    build_index(IndexConfig(type="bm25", corpus=(folder / "corpus.jsonl",), output=folder / "index"))
    rerank(settings(folder, model, corpus=(folder / "index",)))
    assert (folder / "out").read_bytes() == (folder / "expected").read_bytes()
    rerank(settings(folder, model, corpus=(), queries=folder))
    assert (folder / "out").read_bytes() == (folder / "expected").read_bytes()


def test_relevant_documents_are_scored_wherever_they_rank(folder: Path, model: Path) -> None:
    before = read_run(folder / "run")
    deep, shallow = before["q1"][8].document_id, before["q1"][0].document_id
    gone = next(f"d{n}" for n in range(DOCUMENTS) if f"d{n}" not in {hit.document_id for hit in before["q2"]})
    (folder / "qrels").write_text(f"q1 0 {deep} 1\nq1 0 {shallow} 1\nq2 0 {gone} 1\nq8 0 d1 1\n")
    rerank(settings(folder, model, add_relevant=folder / "qrels", top_k=DEPTH + 1))
    opened = Reranker.load(str(model), device="cpu")
    documents = {each.id: each for each in read_documents([folder / "corpus.jsonl"])}
    found = read_run(folder / "out")
    for query_id, name, text in (("q1", deep, "blue why?"), ("q2", gone, "air numbers?")):
        scores = {hit.document_id: hit.score for hit in found[query_id]}
        assert scores[name] == pytest.approx(reference.score(opened, text, documents[name]), rel=1e-4, abs=1e-5)
        assert len(scores) == DEPTH + 1
    (folder / "qrels").write_text("q1 0 d1 1\nq1 0 nowhere 1\n")
    with pytest.raises(DataError, match=r"qrels:2: the corpus has no document with the id 'nowhere'"):
        rerank(settings(folder, model, add_relevant=folder / "qrels"))


# Stopped and gone on -----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from llara import rerank
from llara.config import RerankConfig
torch.set_num_threads(1)
rerank._WINDOW = 13
plain = rerank.write_atomic
def write(path, chunks):
    if path.name == "window-00002":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(path, chunks)
rerank.write_atomic = write
folder, model = map(Path, sys.argv[1:])
rerank.rerank(RerankConfig(model=str(model), device="cpu", offline=True, depth=6, run=folder / "run",
    queries=folder / "queries.jsonl", corpus=(folder / "corpus.jsonl",), output=folder / "out"))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, folder, model], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "out.partial" / "windows").glob("window-*")) == [
        "window-00000",
        "window-00001",
    ]
    monkeypatch.setattr(rerank_module, "_WINDOW", 13)
    rerank(settings(folder, model, output=folder / "whole"))
    scored: list[int] = []
    plain = Reranker.score
    watched: Callable[..., Any] = lambda self, *args: scored.append(len(args[0])) or plain(self, *args)  # noqa: E731
    monkeypatch.setattr(Reranker, "score", watched)
    result = rerank(settings(folder, model))
    assert result.reused_queries == 6 and sum(scored) - 3 == 6  # three pairs are the probe's
    assert (folder / "out").read_bytes() == (folder / "whole").read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    plain = rerank_module.write_atomic

    def write(path: Path, chunks: Any) -> Any:
        if path.name == f"window-{windows:05d}":
            raise KeyboardInterrupt
        return plain(path, chunks)

    monkeypatch.setattr(rerank_module, "_WINDOW", 13)
    monkeypatch.setattr(rerank_module, "write_atomic", write)


def test_what_decides_the_bytes_may_not_change_on_the_way(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stop_after(stopped, 1)
        with pytest.raises(KeyboardInterrupt):
            rerank(settings(folder, model))
    for changes, said in (
        ({"depth": 5}, "depth was 6, is now 5"),
        ({"first_stage_weight": 0.5}, "first_stage_weight was 0.0, is now 0.5"),
        ({"length": 50}, "contract.length was 60, is now 50"),
    ):
        with pytest.raises(StorageError, match=said):
            rerank(settings(folder, model, **changes))  # type: ignore[arg-type]
    with (folder / "queries.jsonl").open("a") as file:
        file.write('{"_id": "q99", "text": "is in no run"}\n')
    assert rerank(settings(folder, model)).reused_queries > 0


def test_a_corrected_command_may_follow_one_that_finished_nothing(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stop_after(stopped, 0)
        with pytest.raises(KeyboardInterrupt):
            rerank(settings(folder, model))
    rows = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(reversed(rows)))
    assert rerank(settings(folder, model, depth=3)).reused_queries == 0


def test_mistakes_are_named_before_the_first_pair_is_scored(folder: Path, model: Path, tmp_path: Path) -> None:
    for changes, kind, said in (
        ({"corpus": ()}, ConfigError, "--corpus: is required"),
        ({"output": folder / "run"}, ConfigError, "is also an input"),
        ({"model": "mini"}, ModelError, "is a retriever"),
        ({"model": str(tiny.save_base(tmp_path / "base"))}, ModelError, "has no score head"),
        ({"queries": folder, "split": "dev"}, DataError, "no split 'dev'"),
    ):
        with pytest.raises(kind, match=said):
            rerank(settings(folder, model, **changes))  # type: ignore[arg-type]
    write_run(
        folder / "strange", {"q1": rank_hits("q1", [("d1", 2.0), ("gone", 1.0)]), "q99": rank_hits("q99", [("d1", 1)])}
    )
    with pytest.raises(DataError, match=r"strange:3: .*queries\.jsonl has no query with the id 'q99'"):
        rerank(settings(folder, model, run=folder / "strange"))
    write_run(folder / "strange", {"q1": rank_hits("q1", [("d1", 2.0), ("gone", 1.0)])})
    with pytest.raises(DataError, match=r"strange:2: the corpus has no document with the id 'gone'"):
        rerank(settings(folder, model, run=folder / "strange"))
    assert rerank(settings(folder, model, run=folder / "strange", depth=1)).pairs == 1  # it is not needed then
    with pytest.raises(ConfigError) as caught:
        RerankConfig(run=folder, queries=folder, output=folder, depth=0, first_stage_weight=1.5)
    for said in ("--model: is required", "--depth: must be 1", "--first-stage-weight: must be between 0 and 1"):
        assert said in str(caught.value)


def test_another_kind_of_model_is_refused_before_the_corpus_is_read(folder: Path, model: Path, tmp_path: Path) -> None:
    tiny.model().save(tmp_path / "retriever")
    (folder / "corpus.jsonl").write_text("{broken\n")
    with pytest.raises(ModelError, match=r"is a retriever, which makes vectors .* and not a reranker"):
        rerank(settings(folder, tmp_path / "retriever"))
    with pytest.raises(ConfigError, match="--template: 'paper' is neither a file nor a reranker's template"):
        rerank(settings(folder, model, template="paper"))
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: broken JSON"):
        rerank(settings(folder, model))


def test_a_base_goes_with_an_adapter(folder: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--base: goes with an adapter, and .*model is a whole model"):
        rerank(settings(folder, model, base="mini"))


def test_scores_that_are_no_numbers_are_not_written(folder: Path, tmp_path: Path) -> None:
    broken = reranker()
    broken.lm.score.weight.data.fill_(float("inf"))
    broken.save(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"gives (nan|inf|-inf) for query|do not give the scores"):
        rerank(settings(folder, tmp_path / "broken"))
    assert not (folder / "out").exists()


def test_an_adapter_reranks_with_its_base(folder: Path, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    base.rename(tmp_path / "moved")
    changes = {"base": str(tmp_path / "moved"), "template": "rankllama-v1", "query_length": 20, "length": 60}
    assert rerank(settings(folder, tmp_path / "adapter", **changes)).queries == QUERIES
