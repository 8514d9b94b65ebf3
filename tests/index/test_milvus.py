import fcntl
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.cli import main
from llara.config import IndexConfig
from llara.errors import ConfigError, MissingExtra, ModelError, StorageError
from llara.files import read_json
from llara.index import milvus
from llara.index.base import Allowed, Manifest
from llara.index.job import index
from llara.index.milvus import MilvusIndex, Server
from llara.index.opening import open_index
from tests.index.helpers import make_milvus
from tests.index.test_build import write_corpus
from tests.index.test_change import ask, delete, write_folder

pytest.importorskip("pymilvus")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vectors of 60 documents, a flat index and one in Milvus Lite."""
    folder = tmp_path_factory.mktemp("milvus")
    vectors = write_folder(folder / "vectors", write_corpus(folder / "corpus.jsonl", 60))
    for kind in ("flat", "milvus"):
        index(IndexConfig(vectors=vectors, output=folder / kind, type=kind))  # type: ignore[arg-type]
    return folder


def test_hits_are_those_of_a_flat_index(made: Path) -> None:
    flat, ours = open_index(made / "flat"), open_index(made / "milvus", verify=True)
    assert isinstance(ours, MilvusIndex) and len(ours) == 60
    for (scores, ids), (exact, wanted) in zip(ask(ours), ask(flat), strict=True):
        assert ids == wanted
        assert scores == pytest.approx(exact, abs=1e-6)


def test_the_folder_holds_where_the_vectors_are_and_no_vectors(made: Path) -> None:
    manifest = Manifest.read(made / "milvus")
    assert manifest.settings["uri"] == "milvus.db" and (made / "milvus" / "milvus.db").exists()
    assert set(manifest.files) == {"ids.txt", "ids.offsets.npy", "config.toml", "identity.json"}
    assert index(IndexConfig(vectors=made / "vectors", output=made / "milvus", type="milvus")).reused


def test_a_path_elsewhere_is_kept_as_it_is_reached_from_the_folder(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output, uri = tmp_path / "a" / "index", "data.db"
    index(IndexConfig(vectors=made / "vectors", output=output, type="milvus", uri=uri, collection="mine"))
    assert Manifest.read(output).settings["uri"] == "../../data.db"
    monkeypatch.chdir("/")
    assert ask(open_index(output)) == ask(open_index(made / "milvus"))
    # Another index may not take its collection.
    with pytest.raises(StorageError, match="has a collection mine already, which another index or program made"):
        other = tmp_path / "other"
        given: Any = {"uri": str(tmp_path / uri), "collection": "mine", "type": "milvus"}
        index(IndexConfig(vectors=made / "vectors", output=other, **given))
    assert ask(open_index(output)) == ask(open_index(made / "milvus"))


def test_a_build_that_was_stopped_is_made_anew(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = IndexConfig(vectors=made / "vectors", output=tmp_path / "index", type="milvus")
    plain = Server.insert

    def stop(self: Server, name: str, start: int, vectors: Any) -> None:
        plain(self, name, start, vectors)
        if start >= 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Server, "insert", stop)
        with pytest.raises(KeyboardInterrupt):
            index(config)
    with pytest.raises(StorageError, match="is no finished index"):
        open_index(config.output)
    assert index(config).documents == 60
    assert ask(open_index(config.output)) == ask(open_index(made / "milvus"))


def test_documents_are_added_and_deleted_in_the_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = write_folder(tmp_path / "vectors", write_corpus(tmp_path / "corpus.jsonl", 30))
    output = tmp_path / "index"
    index(IndexConfig(vectors=vectors, output=output, type="milvus"))
    write_folder(vectors, write_corpus(tmp_path / "corpus.jsonl", 53))
    adding = IndexConfig(vectors=vectors, output=output, add=True)
    before = ask(open_index(output))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            index(adding)
    assert ask(open_index(output)) == before  # rows that the manifest does not know are no hits
    assert index(adding).documents == 53
    index(IndexConfig(vectors=vectors, output=tmp_path / "flat"))
    assert [ids for _, ids in ask(open_index(output))] == [ids for _, ids in ask(open_index(tmp_path / "flat"))]
    with monkeypatch.context() as patch:
        patch.setattr(Server, "delete", stop)
        with pytest.raises(KeyboardInterrupt):
            delete(output, "d3", "d24")
    assert not {"d3", "d24"} & {each for _, ids in ask(open_index(output), 53) for each in ids}
    assert delete(output, "d45").documents == 50
    delete(tmp_path / "flat", "d3", "d24", "d45")
    assert [ids for _, ids in ask(open_index(output))] == [ids for _, ids in ask(open_index(tmp_path / "flat"))]
    opened = open_index(output)
    assert isinstance(opened, MilvusIndex) and opened._extra == 0


def test_a_graph_over_copies_finds_what_a_flat_index_finds(tmp_path: Path) -> None:
    """A tenth are copies of four; of the ten best, at least 0.99 are found."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 16))
    vectors = (centres[rng.integers(0, 40, 4000)] + 0.3 * rng.standard_normal((4000, 16))).astype(np.float32)
    copied = rng.integers(0, 4000, 4)
    vectors[rng.permutation(4000)[:400]] = vectors[copied[rng.integers(0, 4, 400)]]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = (centres[rng.integers(0, 40, 100)] + 0.3 * rng.standard_normal((100, 16))).astype(np.float32)
    (tmp_path / "milvus").mkdir()
    made = make_milvus(tmp_path / "milvus", vectors, [f"d{n}" for n in range(4000)], "AUTOINDEX")
    found = made.search(queries, 10)
    scores = queries @ vectors.T
    least = np.sort(scores, axis=1)[:, -10:-9]
    assert (np.take_along_axis(scores, found.positions, axis=1) >= least - 1e-5).mean() >= 0.99


def test_a_filter_of_many_documents(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "_NAMED", 7)
    monkeypatch.setattr(milvus, "_SPARE", 0)
    ours, flat = open_index(made / "milvus"), open_index(made / "flat")
    queries = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    for share in (0.3, 0.9):
        allowed = Allowed.of(np.random.default_rng(1).random(60) < share)
        for top_k in (5, 60):
            found, wanted = (each.search(queries, top_k, allowed).positions for each in (ours, flat))
            assert found.tolist() == wanted.tolist()


def test_more_hits_than_milvus_gives(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus, "MOST", 20)
    assert [len(ids) for _, ids in ask(open_index(made / "milvus"), 20)] == [20] * 3
    with pytest.raises(ConfigError, match="--top-k: Milvus returns 20 hits at most, asked for 30"):
        ask(open_index(made / "milvus"), 30)


def test_queries_of_another_dimension(made: Path) -> None:
    with pytest.raises(ModelError, match="vectors of dimension 8, the queries are 1 x 5"):
        open_index(made / "milvus").search(np.zeros((1, 5), np.float32), 3)


@pytest.fixture
def changed(tmp_path: Path, made: Path) -> Iterator[tuple[Path, Manifest]]:
    index(IndexConfig(vectors=made / "vectors", output=tmp_path / "index", type="milvus"))
    yield tmp_path / "index", Manifest.read(tmp_path / "index")


def test_a_collection_that_is_gone_or_another_is_an_error(changed: tuple[Path, Manifest]) -> None:
    folder, manifest = changed
    server = Server(str(folder / "milvus.db"), folder)
    name, binding = manifest.settings["collection"], manifest.settings["binding"]
    with pytest.raises(StorageError, match="has no collection nowhere; build the index again"):
        server.check("nowhere", 8, binding)
    with pytest.raises(StorageError, match="was not made for this index"):
        server.check(name, 8, "another")
    with pytest.raises(StorageError, match="holds vectors of dimension 8, the index of 9"):
        server.check(name, 9, binding)
    server.delete(name, np.array([0, 5]))
    with pytest.raises(StorageError, match="has lost 2 of its documents; build the index again"):
        open_index(folder)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for each in held:
            each.close()


def test_a_server_that_does_not_answer_is_an_error_within_seconds(
    tmp_path: Path, made: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus, "TIMEOUT", 1.0)
    for uri in ("http://127.0.0.1:9", silent):
        began = time.monotonic()
        config = IndexConfig(vectors=made / "vectors", output=tmp_path / "index", type="milvus", uri=uri)
        with pytest.raises(StorageError, match=r"Milvus does not answer as it should: .*see whether it runs"):
            index(config)
        assert time.monotonic() - began < 30
        assert not (tmp_path / "index").exists()  # so that a corrected address is welcome


SERVER = """
import sys, time
from milvus_lite.adapter.grpc.server import start_server_in_thread
held = start_server_in_thread(sys.argv[1], port=0)
print(held[2], flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of Milvus in a process of its own, and the process."""
    command = [sys.executable, "-c", SERVER, str(tmp_path / "server.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process
        process.kill()


def test_a_server_that_stops_answering_is_an_error_whatever_it_is_asked(
    tmp_path: Path, made: Path, server: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, process = server
    output = tmp_path / "index"
    index(IndexConfig(vectors=made / "vectors", output=output, type="milvus", uri=uri, milvus_index="FLAT"))
    assert ask(open_index(output))[0][1] == ask(open_index(made / "flat"))[0][1]
    opened, inner = open_index(output), Server(uri, output)
    name, some = str(opened.manifest.settings["collection"]), np.zeros((1, 8), np.float32)
    for each in ("TIMEOUT", "PATIENCE"):
        monkeypatch.setattr(milvus, each, 1.0)
    process.send_signal(signal.SIGSTOP)
    calls: list[Callable[[], Any]] = [
        lambda: opened.search(some, 3),
        lambda: opened.score(some, [np.array([2])]),
        lambda: inner.insert(name, 0, some),
        lambda: inner.finish(name),
        lambda: inner._ask(lambda: inner._client.load_collection(name, timeout=milvus.PATIENCE)),
        lambda: inner.delete(name, np.array([1])),
        lambda: inner.count(name),
    ]
    for number, call in enumerate(calls):
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"Milvus does not answer as it should: .*see whether it runs"):
            call()
        assert time.monotonic() - began < 30, f"call {number}"


def test_a_path_with_something_else_is_refused_in_one_line(
    tmp_path: Path, made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.db").write_text("not a database")
    (tmp_path / "b.db").mkdir()
    (tmp_path / "b.db" / "notes.txt").write_text("mine")
    for name, what in (("a.db", "is a file"), ("b.db", "is a folder with other files")):
        given = ["--vectors", made / "vectors", "--output", tmp_path / "index", "--uri", tmp_path / name]
        assert main(["index", "--type", "milvus", *map(str, given)]) == 2
        said = f"error: {tmp_path / name}: {what}, and no database of Milvus Lite; give another --uri\n"
        assert capfd.readouterr().err == said
    assert not (tmp_path / "index").exists()


def test_what_milvus_logs_is_in_the_error_alone(tmp_path: Path) -> None:
    """A database that another process has open makes Milvus Lite log a traceback."""
    (tmp_path / "a.db" / "collections").mkdir(parents=True)
    script = "import sys; from pathlib import Path; from llara.index.milvus import Server; Server(sys.argv[1], Path())"
    script = f"from llara.errors import StorageError\ntry:\n    {script}\nexcept StorageError as error: print(error)"
    with (tmp_path / "a.db" / "LOCK").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.db")], capture_output=True, text=True)
    assert "Milvus does not answer as it should" in found.stdout and "see what holds it" in found.stdout
    assert "Traceback" not in found.stderr


def test_a_token_is_sent_and_written_nowhere(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pymilvus

    given: list[Any] = []
    plain = pymilvus.MilvusClient

    def watched(**options: Any) -> Any:
        given.append(options)
        return plain(**options)

    monkeypatch.setattr(pymilvus, "MilvusClient", watched)
    monkeypatch.setenv("MILVUS_TOKEN", "root:hidden-word")
    with pytest.raises(AttributeError):  # a class is wanted where the schema is made: what was given is enough here
        index(IndexConfig(vectors=made / "vectors", output=tmp_path / "index", type="milvus"))
    assert given[0]["token"] == "root:hidden-word"
    assert not any(b"hidden-word" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        IndexConfig(vectors=Path("v"), output=Path("i"), type="milvus", uri="milvus.sqlite", collection="my-collection")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["--collection", "--uri"]
    with pytest.raises(ConfigError, match="--uri: ftp:// is no address of Milvus, which begins with http:// or https"):
        IndexConfig(vectors=Path("v"), output=Path("i"), type="milvus", uri="ftp://host:21")
    with pytest.raises(ConfigError, match="put user:password into the variable MILVUS_TOKEN"):
        IndexConfig(vectors=Path("v"), output=Path("i"), type="milvus", uri="https://me:secret@host:19530")
    with pytest.raises(ConfigError, match="--uri: goes with --type milvus"):
        IndexConfig(vectors=Path("v"), output=Path("i"), uri="a.db")


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(MissingExtra, match=r"pip install 'llara\[milvus\]'"):
        Server(str(tmp_path / "a.db"), tmp_path)


def test_the_configuration_is_kept(made: Path) -> None:
    assert read_json(made / "milvus" / "identity.json")["identity"]["milvus_index"] == "AUTOINDEX"
