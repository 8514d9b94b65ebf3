import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import IndexConfig
from llara.data import read_rows
from llara.encoding.shards import write_vectors
from llara.errors import ConfigError, DataError, StorageError
from llara.index import change, faiss
from llara.index.base import Manifest
from llara.index.job import index
from llara.index.opening import AnyIndex, open_index
from llara.records import Document
from tests.encoding.helpers import tree
from tests.index.helpers import as_terms
from tests.index.test_build import vector, write_corpus

DIM, VOCABULARY = 8, 60
TYPES = ("flat", "hnsw", "ivfpq", "rabitq", "sparse", "bm25")
APPROXIMATE = TYPES[1:4]


def terms_of(document: Document) -> dict[int, float]:
    number = int(document.id[1:])
    return {number % VOCABULARY: 1.0, (7 * number) % 20: 0.5, 3: 0.25}


def write_folder(folder: Path, corpus: Path, model: str = "m1") -> Path:
    """A vectors folder with sparse vectors, ten documents a shard."""

    def encode(documents: list[Document]) -> Any:
        return np.array([vector(each) for each in documents], np.float32), as_terms([*map(terms_of, documents)])

    sparse = {"top_k": 9, "expansion": False, "fold": False, "vocabulary": VOCABULARY}
    identity = {"model_fingerprint": model, "dtype": "float32", "sparse": sparse}
    write_vectors(folder, read_rows([corpus]), encode, identity, DIM, "float32", 10, about={"model_path": "mini"})
    return folder


@pytest.fixture
def grown(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The folder, with 30 documents, and a corpus that has got 23 more since it was encoded."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", 30)
    folder = write_folder(tmp_path / "vectors", corpus)
    write_corpus(corpus, 53)
    yield folder, corpus


def build(output: Path, vectors: Path, kind: Any, **settings: Any) -> None:
    index(IndexConfig(vectors=vectors, output=output, type=kind, **settings))


def ask(opened: AnyIndex, top_k: int = 20) -> list[tuple[list[float], list[str]]]:
    """Scores and ids of what three queries find."""
    asked: dict[str, Any] = {
        "vectors": np.array([vector(Document(f"d{number}", "")) for number in (3, 24, 45)], np.float32),
        "terms": as_terms([{number: 1.0, 3: 0.5} for number in (3, 24, 45)]),
        "texts": ["number3 word", "number24 text", "number45"],
    }
    found = opened.search(asked[opened.asks], top_k)
    pairs = zip(found.scores, found.positions, strict=True)
    return [([*scores[at >= 0].tolist()], [opened.ids[each] for each in at[at >= 0].tolist()]) for scores, at in pairs]


def delete(output: Path, *ids: str) -> Any:
    file = output.parent / "ids.txt"
    file.write_text("".join(f"{each}\n" for each in ids))
    return index(IndexConfig(output=output, delete=file))


@pytest.mark.parametrize("kind", TYPES)
def test_added_documents_are_found_as_in_an_index_of_all(tmp_path: Path, grown: tuple[Path, Path], kind: str) -> None:
    vectors, corpus = grown
    output, whole = tmp_path / "index", tmp_path / "whole"
    build(output, vectors, kind)
    write_folder(vectors, corpus)
    result = index(IndexConfig(vectors=vectors, output=output, add=True))
    assert (result.type, result.documents, result.reused) == (kind, 53, False)
    build(whole, vectors, kind)
    assert ask(open_index(output, verify=True)) == ask(open_index(whole))
    again = index(IndexConfig(vectors=vectors, output=output, add=True))
    assert again.reused and again.documents == 53
    assert index(IndexConfig(vectors=vectors, output=output, type=kind)).reused  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TYPES)
def test_deleted_documents_are_never_found_and_hits_stay_full(
    tmp_path: Path, grown: tuple[Path, Path], kind: str
) -> None:
    output = tmp_path / "index"
    build(output, grown[0], kind)
    before = ask(open_index(output), 30)
    gone = before[0][1][:4]
    result = delete(output, *gone, gone[0])
    assert (result.documents, result.type) == (26, kind)
    after = ask(open_index(output, verify=True), 30)
    for (scores, ids), (kept_scores, kept) in zip(before, after, strict=True):
        wanted = [(score, each) for score, each in zip(scores, ids, strict=True) if each not in gone]
        assert list(zip(kept_scores, kept, strict=True)) == wanted
    assert delete(output, *gone).reused
    other = next(f"d{number}" for number in range(30) if f"d{number}" not in gone)
    assert delete(output, other).documents == 25
    names = {path.name for path in output.iterdir()} - {"manifest.json"}
    assert names == set(Manifest.read(output).files)  # the list before this one is gone


@pytest.mark.parametrize("kind", TYPES)
def test_documents_stay_deleted_when_others_are_added(tmp_path: Path, grown: tuple[Path, Path], kind: str) -> None:
    vectors, corpus = grown
    output = tmp_path / "index"
    build(output, vectors, kind)
    delete(output, "d3", "d24")
    write_folder(vectors, corpus)
    assert index(IndexConfig(vectors=vectors, output=output, add=True)).documents == 51
    delete(output, "d45")
    found = ask(open_index(output), 60)
    assert not {"d3", "d24", "d45"} & {each for _, ids in found for each in ids}
    assert all(ids for _, ids in found[:2]) and len(open_index(output)) == 53
    names = {path.name for path in output.iterdir()} - {"manifest.json"}
    manifest = Manifest.read(output)
    assert names == set(manifest.files) | {part["folder"] for part in manifest.parts}


def test_words_of_a_corpus_are_added(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 8)
    output, whole = tmp_path / "index", tmp_path / "whole"
    index(IndexConfig(corpus=(corpus,), output=output, type="bm25", k1=1.1))
    write_corpus(corpus, 14)
    with pytest.raises(StorageError, match="the corpus has changed since"):
        index(IndexConfig(corpus=(corpus,), output=output, type="bm25", k1=1.1))
    assert index(IndexConfig(corpus=(corpus,), output=output, add=True)).documents == 14
    index(IndexConfig(corpus=(corpus,), output=whole, type="bm25", k1=1.1))
    assert ask(open_index(output)) == ask(open_index(whole))
    write_corpus(corpus, 5)
    with pytest.raises(StorageError, match="the corpus has changed since"):
        index(IndexConfig(corpus=(corpus,), output=output, add=True))
    assert ask(open_index(output)) == ask(open_index(whole))


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_an_index_in_parts_finds_what_the_whole_one_does(
    tmp_path: Path, grown: tuple[Path, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, corpus = grown
    write_folder(vectors, corpus)
    build(tmp_path / "whole", vectors, "flat")
    monkeypatch.setattr(faiss, "EXACT", 0)
    build(tmp_path / "index", vectors, kind, part_size=15)
    opened = open_index(tmp_path / "index", verify=True)
    assert [part["count"] for part in opened.manifest.parts] == [10, 10, 10, 13]
    overlap = [
        len(set(ours) & set(theirs)) / 20
        for (_, ours), (_, theirs) in zip(ask(opened), ask(open_index(tmp_path / "whole")), strict=True)
    ]
    assert min(overlap) > 0.9
    before = tree(tmp_path / "index")
    assert index(IndexConfig(vectors=vectors, output=tmp_path / "index", type=kind, part_size=15)).reused  # type: ignore[arg-type]
    assert tree(tmp_path / "index") == before


def test_a_grown_folder_is_told_from_another(tmp_path: Path, grown: tuple[Path, Path]) -> None:
    vectors, corpus = grown
    output = tmp_path / "index"
    build(output, vectors, "hnsw")
    write_folder(vectors, corpus)
    with pytest.raises(StorageError, match=r"lacks 23 documents .* add them with: .*llara index --add --vectors"):
        build(output, vectors, "hnsw")
    other = write_folder(tmp_path / "other", corpus, "m2")
    with pytest.raises(StorageError, match="vectors of another model, or made with other settings"):
        index(IndexConfig(vectors=other, output=output, add=True))
    fewer = write_folder(tmp_path / "fewer", write_corpus(tmp_path / "fewer.jsonl", 12))
    with pytest.raises(StorageError, match="something else than the first documents"):
        index(IndexConfig(vectors=fewer, output=output, add=True))
    with pytest.raises(StorageError, match="is a hnsw index; add to it from --vectors"):
        index(IndexConfig(corpus=(corpus,), output=output, add=True))
    with pytest.raises(StorageError, match="no such folder"):
        index(IndexConfig(vectors=vectors, output=tmp_path / "nowhere", add=True))


@pytest.mark.parametrize("kind", ["hnsw", "bm25"])
@pytest.mark.parametrize("fails", ["publish", "fill_part", "write_deleted"])
def test_a_change_that_was_stopped_leaves_the_index_as_it_was(
    tmp_path: Path, grown: tuple[Path, Path], kind: str, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, corpus = grown
    output = tmp_path / "index"
    build(output, vectors, kind)
    before = ask(open_index(output))
    write_folder(vectors, corpus)
    adding = IndexConfig(vectors=vectors, output=output, add=True)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((Manifest, fails) if fails == "publish" else (change, fails)), stop)
        with pytest.raises(KeyboardInterrupt):
            delete(output, "d3") if fails == "write_deleted" else index(adding)
    assert ask(open_index(output, verify=True)) == before
    assert index(adding).documents == 53
    assert delete(output, "d3").documents == 52


def test_unknown_ids_are_named_and_nothing_is_deleted(tmp_path: Path, grown: tuple[Path, Path]) -> None:
    output = tmp_path / "index"
    build(output, grown[0], "flat")
    before = tree(output)
    with pytest.raises(DataError, match=r"ids.txt:2: the index has no document 'x1', 'x2' \(2 of 3 ids\); nothing"):
        delete(output, "d1", "x1", "x2")
    with pytest.raises(DataError, match="names no document"):
        delete(output)
    with pytest.raises(StorageError, match="no document would be left"):
        delete(output, *(f"d{number}" for number in range(30)))
    with pytest.raises(DataError, match="cannot be read"):
        index(IndexConfig(output=output, delete=tmp_path / "absent.txt"))
    assert tree(output) == before


def test_a_damaged_list_of_deleted_documents_is_an_error(tmp_path: Path, grown: tuple[Path, Path]) -> None:
    output = tmp_path / "index"
    build(output, grown[0], "flat")
    delete(output, "d1", "d7")
    path = output / Manifest.read(output).deleted
    data = path.read_bytes()
    path.write_bytes(data[:-8] + (99).to_bytes(8, "little"))
    with pytest.raises(StorageError, match="holds positions that no document has"):
        open_index(output)
    path.write_bytes(data[:-16] + data[-8:] + data[-16:-8])
    with pytest.raises(StorageError, match="holds positions that no document has"):
        open_index(output)
    path.write_bytes(data[:-3])
    with pytest.raises(StorageError, match="is damaged: has"):
        open_index(output)


def test_a_part_that_was_exchanged_is_an_error(tmp_path: Path, grown: tuple[Path, Path]) -> None:
    vectors, corpus = grown
    output = tmp_path / "index"
    build(output, vectors, "flat")
    write_folder(vectors, corpus)
    index(IndexConfig(vectors=vectors, output=output, add=True))
    part = output / "part-00001" / "manifest.json"
    content = json.loads(part.read_text())
    from llara.encoding.manifest import write_sealed

    write_sealed(part, {**content, "source": "another"})
    with pytest.raises(StorageError, match=r"is not the part that .* was made with"):
        open_index(output)


def test_what_a_change_takes_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        IndexConfig(output=Path("i"), add=True, type="hnsw", hnsw_m=8)
    assert caught.value.problems == (
        "--type: goes with a new index, not with --add",
        "--hnsw-m: goes with a new index, not with --add",
        "--vectors or --corpus: --add needs exactly one of the two",
    )
    with pytest.raises(ConfigError, match="--delete: goes with --output alone"):
        IndexConfig(output=Path("i"), delete=Path("ids"), vectors=Path("v"))
