"""The document store by position, by id, and in order."""

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from llara.data import Row, parse_document, read_rows
from llara.encoding import documents as store_module
from llara.encoding.documents import MAX_DOCUMENT_BYTES, MAX_ROW_BYTES, DocumentStore, document_line
from llara.encoding.shards import write_documents
from llara.errors import StorageError
from llara.records import Document
from tests.encoding.helpers import corpus_lines, write_corpus

COUNT = 157


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("documents") / "corpus.jsonl", corpus_lines(COUNT))


@pytest.fixture(scope="module")
def expected(corpus: Path) -> list[Document]:
    return [parse_document(row) for row in read_rows([corpus])]


@pytest.fixture(scope="module")
def store(corpus: Path) -> DocumentStore:
    summary = write_documents(corpus.parent / "store", read_rows([corpus]), shard_size=40)
    assert summary == (4, COUNT, 0, 0)
    return DocumentStore.open(corpus.parent / "store")


def test_positions_number_the_documents_over_all_shards(store: DocumentStore, expected: list[Document]) -> None:
    assert len(store) == COUNT
    assert [store.get(position) for position in range(COUNT)] == expected
    assert [store.id(position) for position in range(COUNT)] == [document.id for document in expected]
    assert expected[3].metadata == {"year": 1903}
    for position in (-1, COUNT):
        with pytest.raises(IndexError):
            store.get(position)


def test_ranges_of_ids_cross_shards(store: DocumentStore, expected: list[Document]) -> None:
    ids = [document.id for document in expected]
    assert store.ids() == ids
    assert store.ids(35, 125) == ids[35:125]
    assert store.ids(50, 50) == []
    assert store.ids(150, 10_000) == ids[150:]


def test_many_documents_are_found_at_once(
    store: DocumentStore, expected: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [expected[n].id for n in (130, 3, 39, 40, 3)] + ["nowhere"]
    assert store.find_all(wanted).tolist() == [130, 3, 39, 40, 3, -1]
    assert store.find_all([]).tolist() == [] and store.get_all([]) == {}
    assert store.get_all(wanted) == {expected[n].id: expected[n] for n in (130, 3, 39, 40)}
    monkeypatch.setattr(store_module, "_hash", lambda identifier: 1)  # also where all ids share a hash
    write_documents(store.folder.parent / "alike", read_rows([store.folder.parent / "corpus.jsonl"]), shard_size=90)
    alike = DocumentStore.open(store.folder.parent / "alike")
    assert alike.find_all(wanted).tolist() == [130, 3, 39, 40, 3, -1]


def test_documents_come_in_order(store: DocumentStore, expected: list[Document]) -> None:
    assert list(store.iter_documents()) == expected


def test_every_id_is_found_and_no_other(store: DocumentStore, expected: list[Document]) -> None:
    assert [store.find(document.id) for document in expected] == list(range(COUNT))
    assert store.find("doc") is None
    assert store.find("") is None
    assert store.document("doc99") == expected[99]
    with pytest.raises(StorageError, match="holds no document with the id 'nobody'"):
        store.document("nobody")


def test_ids_with_one_hash_are_told_apart(
    corpus: Path, tmp_path: Path, expected: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_hash", lambda identifier: len(identifier))
    write_documents(tmp_path / "store", read_rows([corpus]), shard_size=50)
    store = DocumentStore.open(tmp_path / "store")
    assert [store.find(document.id) for document in expected] == list(range(COUNT))
    assert store.find("dox99") is None


def test_few_shards_are_open_at_a_time(
    corpus: Path, tmp_path: Path, expected: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 3)
    write_documents(tmp_path / "store", read_rows([corpus]), shard_size=10)
    store = DocumentStore.open(tmp_path / "store")
    assert [store.get(position) for position in range(COUNT)] == expected
    assert len(store._open) == 3


def test_a_shard_without_documents_takes_no_position(tmp_path: Path) -> None:
    rows = corpus_lines(9)
    rows[3:6] = [b"", b"not json", b"[]"]
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows)
    assert write_documents(tmp_path / "store", read_rows([corpus]), shard_size=3) == (3, 6, 3, 0)
    store = DocumentStore.open(tmp_path / "store")
    assert store.ids() == ["doc0", "doc1", "doc2", "doc6", "doc7", "doc8"]
    assert store.get(3).id == "doc6"
    assert store.find("doc7") == 4
    assert len(list(store.iter_documents())) == 6


def test_a_folder_that_is_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"holds no manifest\.json"):
        DocumentStore.open(tmp_path)
    with pytest.raises(StorageError, match=r"holds no manifest\.json"):
        DocumentStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("tsv", b"d\t" + b"\x01" * 5000),
        ("text", b"d\n" + b'\x1f"\\' * 5000),
        ("json", b'{"_id":"d","text":"t","m":[' + b"9e15," * 5000 + b"1]}"),
        ("json", b'{"_id":"d","text":"t","m":[' + b"1e999," * 5000 + b"1]}"),
        ("json", b'{"_id":1e15,"question":"q","answer":"' + b"\\u0001" * 5000 + b'"}'),
        ("json", json.dumps({"_id": "d", "text": "漢字 Größe " * 2000}, ensure_ascii=False).encode()),
    ],
)
def test_no_row_grows_beyond_what_a_block_may_hold(kind: str, data: bytes) -> None:
    allowed = MAX_DOCUMENT_BYTES - 6 * (MAX_ROW_BYTES - len(data))
    assert len(document_line(parse_document(Row("corpus", 1, data, kind)))) <= allowed


def test_a_row_longer_than_the_store_keeps_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara.encoding.intake.MAX_ROW_BYTES", 200)
    rows = [*corpus_lines(2), json.dumps({"_id": "long", "text": "x" * 200}).encode()]
    write_documents(tmp_path / "store", read_rows([write_corpus(tmp_path / "corpus.jsonl", rows)]))
    assert DocumentStore.open(tmp_path / "store").ids() == ["doc0", "doc1"]
    assert "bytes; at most 200 are kept" in (tmp_path / "store" / "rejected.jsonl").read_text()


def craft(folder: Path, unpacked: bytes, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> DocumentStore:
    """A store whose checksums all fit, and whose only block holds `unpacked`."""
    block = zlib.compress(unpacked)
    table = np.array([[0, 0, zlib.crc32(block)], [COUNT, len(block), 0]], np.int64).T
    monkeypatch.setattr(store_module, "_pack", lambda documents: ([block], table))
    write_documents(folder, read_rows([corpus]), shard_size=COUNT)
    return DocumentStore.open(folder)


def test_a_block_made_to_fill_the_memory_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_BLOCK_BYTES", 1 << 20)
    store = craft(tmp_path / "store", b"[" * (1 << 25), corpus, monkeypatch)
    tracemalloc.start()
    try:
        with pytest.raises(
            StorageError, match=r"shard-00000\.docs: is damaged: block 0 unpacks to more than 1,048,576"
        ):
            store.get(0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("unpacked", "said"),
    [
        (b"\n" * 100_000, f"does not hold {COUNT} whole lines"),
        (b"{}\n" * (COUNT - 1) + b"{}", f"does not hold {COUNT} whole lines"),
        (b"\r" * 100_000 + b"\n" * COUNT, "cannot be read"),
        (b"[" * 100_000 + b"\n" * COUNT, "cannot be read"),
    ],
)
def test_a_block_of_other_lines_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unpacked: bytes, said: str
) -> None:
    with pytest.raises(StorageError, match=said):
        craft(tmp_path / "store", unpacked, corpus, monkeypatch).get(0)
