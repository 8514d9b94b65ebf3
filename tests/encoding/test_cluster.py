"""A Ray cluster on this machine: a node is killed in the middle, and addresses at which no cluster answers."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llara.cli import main
from llara.config import EncodeConfig
from llara.encoding import cluster as ours
from llara.encoding import shards
from llara.encoding.encode import encode
from llara.errors import MissingExtra, WorkerError
from tests import tiny
from tests.encoding.helpers import corpus_lines, tree, write_corpus

pytest.importorskip("ray")
SHARD, ROWS = 500, 6_000  # shards that take long enough to be under way when their node is killed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("cluster") / "model")


@pytest.fixture
def nodes() -> Iterator[Any]:
    """Two nodes, each with room for one worker."""
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        cluster.add_node(**size)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_node_that_is_killed_in_the_middle_changes_no_byte(
    nodes: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("corpus.jsonl"), corpus_lines(ROWS))
    given: dict[str, Any] = {"model": str(model), "corpus": (Path("corpus.jsonl"),), "output": Path("vectors")}
    given |= {"shard_size": SHARD, "device": "cpu", "sparse": True, "worker_threads": 1}
    encode(EncodeConfig(**given))
    undisturbed = tree(Path("vectors"))
    Path("vectors").rename("undisturbed")

    sent: list[str] = []
    published: list[str] = []
    send, publish, hand_out = ours.Cluster._send, shards.write_document_files, ours.Cluster._hand_out

    def handing_out(self: ours.Cluster, desk: Any) -> None:
        if published or len(self._ready) == 2:  # so that the node that will die has shards
            hand_out(self, desk)

    def sending(self: ours.Cluster, number: int, job: Any) -> None:
        assert job.name not in published, "a finished shard is encoded again"
        sent.append(job.name)
        send(self, number, job)

    def publishing(folder: Path, name: str, documents: Any) -> Any:
        if len(published) == 2:
            (node,) = nodes.worker_nodes
            nodes.remove_node(node, allow_graceful=False)
        published.append(name)
        return publish(folder, name, documents)

    monkeypatch.setattr(ours.Cluster, "_hand_out", handing_out)
    monkeypatch.setattr(ours.Cluster, "_send", sending)
    monkeypatch.setattr(shards, "write_document_files", publishing)
    result = encode(EncodeConfig(**given, engine="ray", address=nodes.address, workers=2))
    assert (result.shards, result.documents) == (ROWS // SHARD, ROWS)
    assert tree(Path("vectors")) == undisturbed, "the whole folder, config.toml and manifest included"
    assert len(published) == ROWS // SHARD < len(sent), "shards of the dead node were taken over"
    assert "will be encoded again" in capsys.readouterr().err


def refused(address: str) -> str:
    with pytest.raises(WorkerError) as caught:
        ours.join(ours._import_ray(), address)
    return str(caught.value)


def test_an_address_at_which_nothing_listens_is_an_error_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", corpus_lines(3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--engine", "ray", "--address", address, "--output", str(tmp_path / "vectors")]
    assert main(["encode", "--model", "mini", "--corpus", str(corpus), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --address {address}: nothing answers there (Connection refused)")
    assert said.count("\n") == 1
    assert not (tmp_path / "vectors").exists()


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port", "ray://host:10001", "host:99999"])
def test_what_is_no_address_is_named(address: str) -> None:
    assert "is neither HOST:PORT nor auto" in refused(address)


def test_what_listens_and_is_no_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "PROBED_WITHIN", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = refused(f"127.0.0.1:{server.getsockname()[1]}")
    assert "no Ray cluster has answered within 2 s" in said


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    config = EncodeConfig(model="mini", corpus=(Path("c"),), output=Path("o"), engine="ray", address="auto")
    with pytest.raises(MissingExtra, match=r"pip install 'llara\[ray\]'"):
        ours.Cluster(config)


def test_a_cluster_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        def cluster_resources(self) -> dict[str, float]:
            return {"CPU": 3.0, "GPU": 2.0}

        def nodes(self) -> list[dict[str, Any]]:
            alive = {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 2.0}}
            return [alive, alive, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]

    given: dict[str, Any] = {"model": "mini", "corpus": (Path("c"),), "output": Path("o")}
    given |= {"engine": "ray", "address": "a:1"}
    room = [
        ours._room(Empty(), ours._needs(Empty(), EncodeConfig(**given, **changes)))  # type: ignore[arg-type]
        for changes in ({}, {"worker_gpus": 0.5}, {"device": "cpu"}, {"worker_threads": 2}, {"worker_gpus": 2})
    ]
    assert room == [2, 2, 2, 0, 2]
    pool = ours.Cluster(EncodeConfig(**given, worker_threads=2))
    pool._ray = Empty()  # type: ignore[assignment]
    with pytest.raises(WorkerError, match="no node has room for a worker of 2 CPU and 1 GPU"):
        pool._start()
