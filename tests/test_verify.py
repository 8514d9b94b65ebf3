"""`verify` finds any changed byte, and says what it looked at."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import EncodeConfig, IndexConfig, ModelConfig, VerifyConfig
from llara.encoding.encode import encode
from llara.encoding.manifest import read_sealed, write_sealed
from llara.encoding.passages import Cutter, Span
from llara.errors import LlaraError, ModelError, StorageError
from llara.files import write_json_atomic
from llara.index.base import Manifest
from llara.index.build import build_index
from llara.index.change import delete_documents
from llara.index.flat import FlatIndex
from llara.loading import load_model
from llara.records import Document
from llara.retriever import Retriever
from llara.verify import VerifyReport, _live_positions, terms_apart, verify

FOLDERS = (
    "model",
    "vectors",
    "sparse-vectors",
    "cut-vectors",
    "flat",
    "ivfpq",
    "parted",
    "sparse",
    "bm25",
    "cut",
    "cut-parted",
)
VECTORS = ("vectors", "sparse-vectors", "cut-vectors")
UNCHECKED = {".lock"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, made from ten documents."""
    root = tmp_path_factory.mktemp("made")
    corpus = root / "corpus.jsonl"
    corpus.write_text("".join(f'{{"_id": "d{i}", "text": "text number {i} of ten"}}\n' for i in range(10)))
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=root / "vectors"))
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=root / "sparse-vectors", sparse=True, shard_size=4))
    cut: dict[str, Any] = {"long": "cut", "passage_length": 16, "shard_size": 4}
    encode(EncodeConfig(model="mini", corpus=(long_corpus(root),), output=root / "cut-vectors", **cut))
    build_index(IndexConfig(vectors=root / "vectors", output=root / "flat"))
    build_index(IndexConfig(vectors=root / "vectors", type="ivfpq", output=root / "ivfpq"))
    build_index(IndexConfig(vectors=root / "sparse-vectors", type="hnsw", part_size=4, output=root / "parted"))
    build_index(IndexConfig(vectors=root / "sparse-vectors", type="sparse", output=root / "sparse"))
    build_index(IndexConfig(vectors=root / "cut-vectors", output=root / "cut"))
    build_index(IndexConfig(vectors=root / "cut-vectors", type="rabitq", part_size=4, output=root / "cut-parted"))
    build_index(IndexConfig(corpus=(corpus,), type="bm25", output=root / "bm25"))
    load_model(ModelConfig(model="mini")).save(root / "model")
    return root


def long_corpus(root: Path) -> Path:
    """Ten documents, the first of one passage and each of a sentence more than the one before."""
    texts = [" ".join(f"Sentence {j} of text number {i}." for j in range(i + 1)) for i in range(10)]
    corpus = root / "long.jsonl"
    corpus.write_text(
        "".join(f'{{"_id": "d{i}", "title": "t{i}", "text": "{text}"}}\n' for i, text in enumerate(texts))
    )
    return corpus


def check(path: Path) -> VerifyReport:
    return verify(VerifyConfig(path=path))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNCHECKED)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_sound_folder_is_counted_whole(name: str, made: Path) -> None:
    report = check(made / name)
    sizes = [path.stat().st_size for path in files(made / name)]
    assert report.kind == (name if name == "model" else "vectors" if name in VECTORS else "index")
    assert report.documents == (0 if name == "model" else 10)
    assert (report.files, report.bytes) == (len(sizes), sum(sizes))
    assert "all as written" in report.to_text()


@pytest.mark.parametrize("name", FOLDERS)
def test_any_changed_byte_is_found(name: str, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(made / name, folder)
    for path in files(folder):
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1} if whole else set():
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(LlaraError):
                check(folder)
        path.write_bytes(whole)
        path.rename(path.with_suffix(".gone"))
        with pytest.raises(LlaraError):
            check(folder)
        path.with_suffix(".gone").rename(path)


def test_what_was_computed_again_is_said(made: Path) -> None:
    assert check(made / "model").vectors.startswith("gives the ")
    assert check(made / "vectors").vectors == "10 vectors computed again, all the same"
    assert check(made / "sparse-vectors").vectors == "10 vectors and sparse vectors computed again, all the same"
    assert check(made / "cut-vectors").vectors == "16 vectors computed again, all the same"
    for name in ("flat", "ivfpq", "parted", "cut", "cut-parted"):
        assert check(made / name).vectors == "10 vectors computed again, all the same"
    assert check(made / "sparse").vectors == "10 sparse vectors computed again, all the same"
    assert "vectors, 10 documents, " in check(made / "vectors").to_text()


def test_what_is_no_folder_of_ours(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no such folder"):
        check(tmp_path / "none")
    with pytest.raises(StorageError, match=r"holds neither llara\.json .* nor manifest\.json"):
        check(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is no folder"):
        check(tmp_path / "file")
    write_json_atomic(tmp_path / "manifest.json", {"kind": "else"})
    with pytest.raises(StorageError, match="is no index folder, it holds else"):
        check(tmp_path)


def test_a_vector_that_the_model_does_not_give_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Retriever.encode_passages
    monkeypatch.setattr(Retriever, "encode_passages", lambda *args, **named: np.roll(given(*args, **named), 1, 0))
    for name in ("vectors", "cut-vectors", "flat", "ivfpq", "parted", "cut", "cut-parted"):
        with pytest.raises(StorageError, match=rf"{name}: document 'd0': its vector is not the one that mini gives"):
            check(made / name)


def test_passages_that_are_cut_otherwise_are_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Cutter.spans

    def changed(cutter: Cutter, document: Document) -> tuple[str, list[Span]]:
        title, spans = given(cutter, document)
        return title, [Span(span.start, span.stop - (document.id == "d5")) for span in spans]

    monkeypatch.setattr(Cutter, "spans", changed)
    with pytest.raises(StorageError, match=r"cut-vectors: document 'd5': its passage \d is not the one that mini cuts"):
        check(made / "cut-vectors")
    with pytest.raises(StorageError, match=r"cut: document 'd5': its passage \d is not the one that mini cuts"):
        check(made / "cut")


def test_a_sparse_vector_that_the_model_does_not_give_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Retriever.encode_passages_with_terms

    def changed(*arguments: object, **named: object) -> object:
        vectors, terms = given(*arguments, **named)  # type: ignore[arg-type]
        terms.weights[terms.starts[4]] *= 1.1
        return vectors, terms

    monkeypatch.setattr(Retriever, "encode_passages_with_terms", changed)
    for name in ("sparse-vectors", "sparse"):
        said = rf"{name}: document 'd4': its sparse vector is not the one that mini gives: 0\.0"
        with pytest.raises(StorageError, match=said):
            check(made / name)


def test_terms_that_change_places_at_the_cut_are_not_apart() -> None:
    stored = (np.array([7, 3, 5]), np.array([3.0, 2.0, 1.0]))
    again = (np.array([7, 3, 9]), np.array([3.0, 2.0, 1.0]))
    assert terms_apart(stored, stored, 3) == 0
    assert terms_apart(stored, again, 3) == 0
    assert terms_apart(stored, again, 4) == pytest.approx(1 / 14**0.5)
    assert terms_apart(stored, (np.array([7, 3]), np.array([3.0, 2.5])), 4) == pytest.approx(1 / 14**0.5)
    assert terms_apart((np.array([]), np.array([])), (np.array([1]), np.array([0.25])), 4) == 0.25


def test_the_model_of_vectors_is_found_from_any_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    monkeypatch.chdir(copy)
    encode(EncodeConfig(model="model", corpus=(Path("corpus.jsonl"),), output=Path("ours")))
    monkeypatch.chdir(tmp_path)
    assert check(copy / "ours").vectors == "10 vectors computed again, all the same"
    (copy / "model").rename(tmp_path / "elsewhere")
    assert check(copy / "ours").vectors.startswith(
        f"no vector was computed again, its model does not open: {copy / 'model'}"
    )


def test_a_path_may_hold_any_character(made: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copy(made / "corpus.jsonl", tmp_path / "\U0001f600.jsonl"))
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=tmp_path / "vectors"))
    assert check(tmp_path / "vectors").vectors == "10 vectors computed again, all the same"


def test_a_model_that_is_gone_is_said_and_no_fault(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: object, **named: object) -> None:
        raise ModelError("x: no such folder")

    monkeypatch.setattr(Retriever, "for_job", gone)
    for name in ("vectors", "flat", "sparse"):
        said = "no vector was computed again, its model does not open: x: no such folder"
        assert check(made / name).vectors == said
    report = check(made / "bm25")
    assert (report.vectors, report.documents) == ("", 10)


def test_an_index_without_its_texts_is_sound_and_says_so(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    corpus = copy / "other.jsonl"
    corpus.write_text("".join(f'{{"_id": "e{i}", "text": "text number {i} of ten"}}\n' for i in range(10)))
    shutil.rmtree(copy / "vectors")
    said = f"no vector was computed again, its texts cannot be read: {copy / 'flat' / '../vectors'}: holds no manifest"
    assert check(copy / "flat").vectors.startswith(said)
    encode(EncodeConfig(model="mini", corpus=(corpus,), output=copy / "vectors"))
    assert check(copy / "flat").vectors.endswith("../vectors holds other documents by now")


def test_deleted_documents_are_counted_by_themselves(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    (copy / "ids").write_text("d0\nd4\nd9\n")
    for name in ("flat", "cut-parted"):
        delete_documents(IndexConfig(output=copy / name, delete=copy / "ids"))
        report = check(copy / name)
        assert (report.documents, report.deleted) == (7, 3)
        assert "index, 7 documents, 3 deleted, " in report.to_text()
        assert report.vectors == "7 vectors computed again, all the same"


def test_vectors_in_milvus_are_computed_again(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("pymilvus")
    from llara.index.milvus import Server

    build_index(IndexConfig(vectors=made / "vectors", type="milvus", output=tmp_path / "index"))
    (tmp_path / "ids").write_text("d0\nd5\n")
    delete_documents(IndexConfig(output=tmp_path / "index", delete=tmp_path / "ids"))
    report = check(tmp_path / "index")
    assert report.vectors == "8 vectors computed again, all the same"
    assert (report.documents, report.deleted) == (8, 2)
    name = str(Manifest.read(tmp_path / "index").settings["collection"])
    server = Server(str(tmp_path / "index" / "milvus.db"), tmp_path / "index")
    server.insert(name, 3, np.ones((1, 256), np.float32))
    server.finish(name)
    with pytest.raises(StorageError, match="document 'd3': its vector is not the one that mini gives"):
        check(tmp_path / "index")


@pytest.mark.parametrize("deleted", [[], [0], [0, 1, 2, 7, 9], [9], [4, 5, 6, 30]])
def test_a_sample_of_what_is_left(deleted: list[int]) -> None:
    left = [number for number in range(10) if number not in deleted]
    assert _live_positions(10, np.array(deleted, np.int64)).tolist() == left


def test_an_index_that_keeps_no_vectors_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy(FlatIndex):
        stored: Any = None

    monkeypatch.setattr("llara.index.opening.FlatIndex", Lossy)
    said = "no vector was computed again: an index of type flat keeps none as it was"
    assert check(made / "flat").vectors == said


Change = Callable[[dict[str, Any]], None]
MISCOUNTS: dict[str, tuple[str, Change, str]] = {
    "documents": ("manifest.json", lambda said: said.update(documents=9), "says 9 documents, 10 were counted"),
    "rejected": ("manifest.json", lambda said: said.update(rejected=1), "says 1 rejected, 0 were counted"),
    "rows": ("manifest.json", lambda said: said.update(rows=12), "says 12 rows, 10 were counted"),
    "rows of a shard": ("shard-00000.json", lambda said: said.update(end=11), "says 11 rows, 10 were counted"),
    "start of a shard": ("shard-00000.json", lambda said: said.update(start=-1), "says -1 rows before the shard"),
    "rejected of a shard": ("shard-00000.json", lambda said: said["rejected"].append({}), "says 10 rows, 11 were"),
}


@pytest.mark.parametrize("name", MISCOUNTS)
def test_a_count_that_is_wrong_is_found(name: str, made: Path, tmp_path: Path) -> None:
    """Their checksums are right: such a folder is what a fault of ours, or somebody's tool, would leave."""
    file, change, said = MISCOUNTS[name]
    folder = Path(shutil.copytree(made / "vectors", tmp_path / "vectors"))
    content = read_sealed(folder / file)
    change(content)
    digest = write_sealed(folder / file, content)
    if file != "manifest.json":
        manifest = read_sealed(folder / "manifest.json")
        manifest["shards"][0]["digest"] = digest
        write_sealed(folder / "manifest.json", manifest)
    with pytest.raises(StorageError, match=said):
        check(folder)


@pytest.mark.parametrize("suffix", ["ids", "docs"])
def test_documents_that_are_fewer_than_said_are_found(suffix: str, made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "made"))
    few = copy / "few.jsonl"
    few.write_text("".join(f'{{"_id": "d{i}", "text": "text number {i} of ten"}}\n' for i in range(9)))
    encode(EncodeConfig(model="mini", corpus=(few,), output=copy / "few"))
    sidecar, other = (read_sealed(copy / name / "shard-00000.json") for name in ("vectors", "few"))
    for each in (suffix, f"{suffix}.npy"):
        shutil.copy(copy / "few" / f"shard-00000.{each}", copy / "vectors" / f"shard-00000.{each}")
        sidecar["files"][each] = other["files"][each]
    manifest = read_sealed(copy / "vectors" / "manifest.json")
    manifest["shards"][0]["digest"] = write_sealed(copy / "vectors" / "shard-00000.json", sidecar)
    write_sealed(copy / "vectors" / "manifest.json", manifest)
    with pytest.raises(StorageError, match=r"shard-00000\."):
        check(copy / "vectors")
