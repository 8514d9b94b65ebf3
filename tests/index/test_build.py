import json
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import IndexConfig
from llara.data import read_rows
from llara.encoding.manifest import find_model, read_manifest, read_sealed, record_model, write_sealed
from llara.encoding.shards import write_vectors
from llara.errors import ConfigError, DataError, StorageError
from llara.index.base import Manifest, StoredIds, write_ids
from llara.index.build import IndexResult, build_index
from llara.index.flat import FlatIndex
from llara.index.opening import open_index
from llara.records import Document
from tests.encoding.helpers import tree

DIM = 8


def write_corpus(path: Path, count: int = 25, *bad: str) -> Path:
    rows = [json.dumps({"_id": f"d{number}", "text": f"text number{number} word"}) for number in range(count)]
    path.write_text("".join(f"{row}\n" for row in [*rows, *bad]))
    return path


def vector(document: Document) -> list[float]:
    values = np.random.default_rng(int(document.id[1:])).standard_normal(DIM)
    return [float(each) for each in values / np.linalg.norm(values)]


def write_vectors_folder(folder: Path, corpus: Path, model: str = "m1", model_path: str = "models/m1") -> Path:
    def encode(documents: list[Document]) -> Any:
        return np.array([vector(each) for each in documents], np.float32)

    identity = {"model_fingerprint": model}
    write_vectors(folder, read_rows([corpus]), encode, identity, DIM, "float32", 10, about={"model_path": model_path})
    return folder


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    return write_vectors_folder(tmp_path / "vectors", write_corpus(tmp_path / "corpus.jsonl"))


def test_flat_index_from_vectors(tmp_path: Path, vectors: Path) -> None:
    output = tmp_path / "index"
    result = build_index(IndexConfig(vectors=vectors, output=output))
    assert result == IndexResult(output, "flat", 25, 0, result.bytes, False)
    index = open_index(output, verify=True)
    assert isinstance(index, FlatIndex)
    assert [index.ids[position] for position in range(25)] == [f"d{number}" for number in range(25)]
    queries = np.array([vector(Document(f"d{number}", "")) for number in (3, 24)], np.float32)
    assert index.search(queries, 1).positions.tolist() == [[3], [24]]
    manifest = index.manifest
    assert (manifest.model_path, manifest.documents) == ("models/m1", "../vectors")
    assert manifest.model is not None and manifest.model["model_fingerprint"] == "m1"
    kept = {path.name for path in output.iterdir()} - {"manifest.json"}
    assert kept == set(manifest.files)
    assert result.bytes == sum((output / name).stat().st_size for name in kept)


def test_the_places_of_ids_are_held_once(tmp_path: Path) -> None:
    """A build holds eight bytes for each document, and a little while they grow."""
    count = 100_000
    tracemalloc.start()
    try:
        write_ids(tmp_path, (f"d{number}" for number in range(count)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8 * count < most < 13 * count
    ids = StoredIds(tmp_path, count)
    assert [ids[at] for at in (0, 9, 99_999)] == ["d0", "d9", "d99999"]


def test_an_index_needs_no_vectors_folder(tmp_path: Path, vectors: Path) -> None:
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "index"))
    vectors.rename(tmp_path / "elsewhere")
    assert open_index(tmp_path / "index").ids[4] == "d4"


def test_an_index_names_a_local_model_from_its_own_folder(tmp_path: Path) -> None:
    model, folder = tmp_path / "models" / "m1", tmp_path / "made" / "vectors"
    model.mkdir(parents=True)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    write_vectors_folder(folder, corpus, model_path=record_model(str(model), folder))
    assert read_manifest(folder)["about"] == {"model_path": "../../models/m1"}
    config = IndexConfig(vectors=folder, output=tmp_path / "a" / "b" / "index")
    build_index(config)
    assert Manifest.read(config.output).model_path == "../../../models/m1"
    # A model that moved: the index learns it when the vectors did, and keeps what it has while that is right.
    moved = model.rename(tmp_path / "m2")
    write_vectors_folder(folder, corpus, model_path=record_model(str(moved), folder))
    assert build_index(config).reused
    assert Manifest.read(config.output).model_path == "../../../m2"
    elsewhere = folder.rename(tmp_path / "vectors")
    assert build_index(IndexConfig(vectors=elsewhere, output=config.output)).reused
    assert Manifest.read(config.output).model_path == "../../../m2"
    assert find_model(Manifest.read(config.output).model_path, config.output) == str(moved)


def test_a_finished_index_is_left_alone(tmp_path: Path, vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = IndexConfig(vectors=vectors, output=tmp_path / "index")
    build_index(config)
    before = {path.name: path.stat().st_mtime_ns for path in config.output.iterdir()}
    capsys.readouterr()
    assert build_index(config).reused
    assert "nothing to do" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in config.output.iterdir()} == before
    moved = vectors.rename(tmp_path / "moved")
    assert build_index(IndexConfig(vectors=moved, output=config.output)).reused
    assert Manifest.read(config.output).documents == "../moved"


def test_other_vectors_or_settings_are_refused(tmp_path: Path, vectors: Path) -> None:
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "flat"))
    other = write_vectors_folder(tmp_path / "other", tmp_path / "corpus.jsonl", "m2")
    with pytest.raises(StorageError, match="flat: was built from other documents or vectors"):
        build_index(IndexConfig(vectors=other, output=tmp_path / "flat"))
    with pytest.raises(StorageError, match='type was "flat", is now "bm25"'):
        build_index(IndexConfig(vectors=vectors, output=tmp_path / "flat", type="bm25"))
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "words", type="bm25"))
    with pytest.raises(StorageError, match=r"k1 was 0\.9, is now 1\.2"):
        build_index(IndexConfig(vectors=vectors, output=tmp_path / "words", type="bm25", k1=1.2))
    assert build_index(IndexConfig(vectors=other, output=tmp_path / "words", type="bm25")).reused  # same words


def test_somebody_elses_folder_is_refused(tmp_path: Path, vectors: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="choose another --output"):
        build_index(IndexConfig(vectors=vectors, output=tmp_path))


def test_a_build_that_was_stopped_goes_on(tmp_path: Path, vectors: Path) -> None:
    config = IndexConfig(vectors=vectors, output=tmp_path / "index")
    build_index(config)
    whole = {path.name: path.read_bytes() for path in config.output.iterdir()}
    (config.output / "manifest.json").unlink()
    (config.output / "index.faiss").write_bytes(b"cut")
    (config.output / ".tmp-1-index.faiss").write_bytes(b"left over")
    with pytest.raises(StorageError, match="is no finished index; build one with: llara index"):
        open_index(config.output)
    assert not build_index(config).reused
    assert {path.name: path.read_bytes() for path in config.output.iterdir()} == whole


def test_bm25_from_a_corpus_lists_bad_rows(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 4, '{"_id": "d0", "text": "twice"}', "{broken")
    config = IndexConfig(corpus=(corpus,), output=tmp_path / "index", type="bm25")
    result = build_index(config)
    assert (result.documents, result.rejected, result.reused) == (4, 2, False)
    rejected = [json.loads(line) for line in (config.output / "documents" / "rejected.jsonl").read_text().splitlines()]
    assert [each["line"] for each in rejected] == [5, 6]
    assert build_index(config).reused
    index = open_index(config.output, verify=True)
    assert index.search(["number2"], 5).positions.tolist() == [[2, -1, -1, -1]]  # type: ignore[arg-type]
    data = bytearray((config.output / "documents" / "shard-00000.docs").read_bytes())
    data[0] ^= 1
    (config.output / "documents" / "shard-00000.docs").write_bytes(data)
    with pytest.raises(StorageError, match=r"shard-00000\.docs"):
        open_index(config.output, verify=True)


@pytest.mark.parametrize("count", [3, 5])
def test_a_finished_index_keeps_its_documents_when_the_corpus_changes(tmp_path: Path, count: int) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 4)
    config = IndexConfig(corpus=(corpus,), output=tmp_path / "index", type="bm25")
    build_index(config)
    before = tree(config.output)
    write_corpus(corpus, count)
    with pytest.raises(StorageError, match=r"index: is complete for the corpus as it was.*choose another --output, or"):
        build_index(config)
    assert tree(config.output) == before
    assert len(open_index(config.output, verify=True)) == 4
    write_corpus(corpus, 4)
    assert build_index(config).reused
    assert tree(config.output) == before


def test_an_index_made_from_vectors_is_left_alone_by_another_corpus(tmp_path: Path, vectors: Path) -> None:
    output = tmp_path / "index"
    build_index(IndexConfig(vectors=vectors, output=output, type="bm25"))
    before = tree(output)
    same = IndexConfig(corpus=(tmp_path / "corpus.jsonl",), output=output, type="bm25")
    assert build_index(same).reused
    write_corpus(tmp_path / "corpus.jsonl", 26)
    with pytest.raises(StorageError, match="is complete for the corpus as it was"):
        build_index(same)
    assert tree(output) == before


def test_documents_of_a_finished_index_are_repaired(tmp_path: Path) -> None:
    config = IndexConfig(corpus=(write_corpus(tmp_path / "corpus.jsonl", 4),), output=tmp_path / "index", type="bm25")
    build_index(config)
    before = tree(config.output)
    (config.output / "documents" / "shard-00000.json").unlink()
    assert build_index(config).reused
    assert tree(config.output) == before


def test_bm25_is_the_same_from_vectors_and_from_the_corpus(tmp_path: Path, vectors: Path) -> None:
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "a", type="bm25"))
    build_index(IndexConfig(corpus=(tmp_path / "corpus.jsonl",), output=tmp_path / "b", type="bm25"))
    for name in ("postings.scores.npy", "postings.positions.npy", "words.json", "ids.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_mistakes_are_named(tmp_path: Path, vectors: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'german'"):
        build_index(IndexConfig(vectors=vectors, output=tmp_path / "index", type="bm25", language="germany"))
    assert not (tmp_path / "index").exists()
    with pytest.raises(StorageError, match="nowhere"):
        build_index(IndexConfig(vectors=tmp_path / "nowhere", output=tmp_path / "index"))
    with pytest.raises(DataError, match="no such file"):
        build_index(IndexConfig(corpus=(tmp_path / "nothing.jsonl",), output=tmp_path / "index", type="bm25"))
    assert not (tmp_path / "index").exists()
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    config = IndexConfig(corpus=(tmp_path / "bad.jsonl",), output=tmp_path / "index", type="bm25")
    for _ in range(2):
        with pytest.raises(DataError, match=r"documents.rejected\.jsonl: says why no row can be used, of 1"):
            build_index(config)
    assert json.loads((tmp_path / "index" / "documents" / "rejected.jsonl").read_text())["line"] == 1
    write_corpus(tmp_path / "bad.jsonl", 3)
    assert build_index(config).documents == 3


def test_folders_that_are_no_index(tmp_path: Path, vectors: Path) -> None:
    with pytest.raises(StorageError, match="no such folder; build one with: llara index --vectors VECTORS"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"corpus\.jsonl: is a file, not an index folder; give a folder"):
        open_index(tmp_path / "corpus.jsonl")
    with pytest.raises(StorageError, match=r"corpus\.jsonl: is a file, not a folder; choose another --output"):
        build_index(IndexConfig(vectors=vectors, output=tmp_path / "corpus.jsonl"))
    with pytest.raises(StorageError, match="is no index folder, it holds vectors; build an index with"):
        open_index(vectors)


@pytest.mark.parametrize("edit", [lambda text: text.replace('"count": 25', '"count": 24'), lambda text: text + " "])
def test_a_changed_manifest_is_found(tmp_path: Path, vectors: Path, edit: Callable[[str], str]) -> None:
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "index"))
    path = tmp_path / "index" / "manifest.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(StorageError, match=r"manifest\.json: is damaged"):
        open_index(tmp_path / "index")


def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path: Path, vectors: Path) -> None:
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "index"))
    content = read_sealed(tmp_path / "index" / "manifest.json")
    content["files"]["../corpus.jsonl"] = {"bytes": 1, "sha256": ""}
    write_sealed(tmp_path / "index" / "manifest.json", content)
    with pytest.raises(StorageError, match=r"names '\.\./corpus\.jsonl', which is no file name"):
        open_index(tmp_path / "index")


def test_every_changed_byte_is_found_on_request(tmp_path: Path, vectors: Path) -> None:
    build_index(IndexConfig(vectors=vectors, output=tmp_path / "index"))
    for path in sorted((tmp_path / "index").iterdir()):
        data = path.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
            with pytest.raises(StorageError):
                open_index(tmp_path / "index", verify=True)
        path.write_bytes(data)
    open_index(tmp_path / "index", verify=True)


def test_a_file_that_may_not_grow_is_an_error_and_leaves_nothing_behind(tmp_path: Path, vectors: Path) -> None:
    config = IndexConfig(vectors=vectors, output=tmp_path / "index")
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(StorageError, match=r"index.faiss: needs 845 bytes"):
            build_index(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(config.output.glob("*index.faiss*"))
    assert not build_index(config).reused
