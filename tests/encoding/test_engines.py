"""What every engine keeps: the bytes of the plainest run, errors as they were, lost workers replaced, little memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import EncodeConfig
from llara.encoding import engines
from llara.encoding.engine import AHEAD, Job
from llara.encoding.engines import Local, OpenEngine
from llara.errors import DataError, WorkerError
from llara.records import Document
from tests.encoding.fakes import Harmful, HarmfulCluster, HarmfulProcesses
from tests.encoding.helpers import FakeEncoder, run, tree, vector_of, write_corpus

SHARD = 3
KINDS = ("local", "processes", "ray")


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A Ray cluster of two small nodes, each with room for one worker."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**{name: node[name] for name in ("num_cpus", "object_store_memory")})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_address")
    return str(request.param)


@pytest.fixture(params=KINDS[1:])
def pool_kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_address")
    return str(request.param)


def config(**changes: Any) -> EncodeConfig:
    values: dict[str, Any] = {"model": "mini", "corpus": (Path("c"),), "output": Path("o"), "device": "cpu"}
    return EncodeConfig(**values | changes)


def engine_of(kind: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> OpenEngine:
    if kind == "local":
        monkeypatch.setattr(engines, "open_encoder", Harmful)
        monkeypatch.setenv("INLINE", "1")
        return Local(config(**changes))
    if kind == "processes":
        return HarmfulProcesses(config(workers=2, **changes), 2, [])
    return HarmfulCluster(config(engine="ray", address="here", workers=2, **changes))


def rows(texts: list[str]) -> list[bytes]:
    import json

    return [json.dumps({"_id": f"d{n}", "text": text, "year": n}).encode() for n, text in enumerate(texts)]


def encode_all(kind: str, monkeypatch: pytest.MonkeyPatch, corpus: Path, output: Path) -> list[int]:
    """Encodes a corpus; returns what the engine told of its progress."""
    told: list[int] = []

    class Listening:
        def advance(self, n: int) -> None:
            told.append(n)

    with engine_of(kind, monkeypatch) as engine:
        engine.facts()
        run(corpus, output, SHARD, encode=engine, progress=Listening())
    return told


def plain(corpus: Path, output: Path) -> dict[str, str]:
    run(corpus, output, SHARD)
    return tree(output)


def test_every_engine_leaves_the_bytes_of_the_plainest(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = rows([f"text {number}" for number in range(20)])
    lines[4], lines[13] = b"bad", lines[2]  # a duplicate in another shard
    lines[6:9] = [b"bad"] * SHARD  # a shard without documents
    corpus = write_corpus(tmp_path / "corpus.jsonl", lines)
    told = encode_all(kind, monkeypatch, corpus, tmp_path / "out")
    assert tree(tmp_path / "out") == plain(corpus, tmp_path / "plain")
    assert sum(told) == len(lines)


def test_an_error_of_the_users_is_the_same_everywhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows(["a", "b", "c", "RAISE"]))
    with pytest.raises(DataError, match=r"^corpus:3: is a bad one$") as caught:
        encode_all(kind, monkeypatch, corpus, tmp_path / "out")
    assert (caught.value.path, caught.value.line) == ("corpus", 3)


def test_a_fault_of_ours_keeps_its_traceback(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows(["FAULT"]))
    expected = ZeroDivisionError if kind == "local" else RuntimeError
    with pytest.raises(expected, match="ours" if kind == "local" else "ZeroDivisionError: ours"):
        encode_all(kind, monkeypatch, corpus, tmp_path / "out")


def test_a_model_that_does_not_load_is_an_error_of_the_users(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        engine_of(kind, monkeypatch, model="RAISE") as engine,
        pytest.raises(DataError, match="model:7: is a bad one"),
    ):
        engine.facts()


def test_no_more_shards_are_read_than_workers_hold(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def jobs() -> Iterator[Job]:
        for number in range(12):
            taken.append(str(number))
            yield Job(str(number), [Document(str(number), f"text {number}")])

    workers = 1 if kind == "local" else 2
    with engine_of(kind, monkeypatch) as engine:
        engine.facts()
        for count, (name, found) in enumerate(engine.encode(jobs(), lambda n: None)):
            assert len(taken) <= count + workers * AHEAD
            assert np.array_equal(found[0], vector_of(Document(name, f"text {name}")))  # type: ignore[arg-type]
    assert len(taken) == 12


def test_a_killed_worker_is_replaced_and_its_shards_are_taken_over(
    pool_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"text {number}" for number in range(18)]
    texts[7] = f"ONCE {tmp_path / 'killed'}"
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows(texts))
    told = encode_all(pool_kind, monkeypatch, corpus, tmp_path / "out")
    assert (tmp_path / "killed").exists()
    assert tree(tmp_path / "out") == plain(corpus, tmp_path / "plain")
    assert sum(told) == len(texts)
    said = capsys.readouterr().err
    assert "shard-00002" in said and "will be encoded again" in said


def test_a_shard_that_kills_its_workers_ends_the_run_with_its_documents(
    pool_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {number}" for number in range(12)]
    texts[4] = "KILL"
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows(texts))
    with pytest.raises(WorkerError, match=r"shard-00001 was lost with 3 workers.* its 3 documents are d3, d4, d5\. "):
        encode_all(pool_kind, monkeypatch, corpus, tmp_path / "out")
    finished = sorted(path.stem for path in (tmp_path / "out").glob("shard-*.json"))
    texts[4] = "mended"  # a corpus of the same finished rows goes on from there
    write_corpus(corpus, rows(texts))
    again = FakeEncoder()
    run(corpus, tmp_path / "out", SHARD, encode=again)
    assert "shard-00001" not in finished and len(again.calls) == 4 - len(finished)
    assert tree(tmp_path / "out") == plain(corpus, tmp_path / "plain")


def test_workers_that_die_while_loading_end_the_run(pool_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        engine_of(pool_kind, monkeypatch, model="KILL") as engine,
        pytest.raises(WorkerError, match="3 workers in a row were lost while loading the model"),
    ):
        engine.facts()
