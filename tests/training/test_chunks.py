"""Chunks: cut within a document, chained, prepared once, and never read when damaged."""

from pathlib import Path

import numpy as np
import pytest

from llara.data import read_documents
from llara.errors import DataError, StorageError
from llara.model import EmbeddingModel
from llara.training import chunks as chunks_module
from llara.training.chunks import ChunkStore, cut, fingerprint, prepare_chunks
from tests import tiny
from tests.reference.chunks import cut_document
from tests.training.helpers import write_lines, write_text


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model()


def content(store: ChunkStore) -> list[tuple[list[int], list[int]]]:
    return [(store[i].text.tolist(), store[i].next_text.tolist()) for i in range(len(store))]


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 23, 24, 80])
@pytest.mark.parametrize("min_length", [1, 3, 8])
def test_a_document_is_cut_like_the_slow_twin(tokens: int, min_length: int) -> None:
    ids = list(range(100, 100 + tokens))
    spans = cut(tokens, 5, 8, min_length)
    found = [(ids[start - 5 : end - 5], ids[end - 5 : last - 5]) for start, end, last in spans.tolist()]
    assert found == cut_document(ids, 8, min_length)


def test_a_short_last_chunk_is_only_a_next_text() -> None:
    assert cut(18, 0, 8, 4).tolist() == [[0, 8, 16], [8, 16, 18]]
    assert cut(3, 0, 8, 4).tolist() == []
    assert cut(16, 0, 8, 4).tolist() == [[0, 8, 16], [8, 16, 16]]  # the last one has no next text


def test_the_store_holds_what_the_slow_twin_cuts(
    model: EmbeddingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks_module, "DOCUMENTS_AT_ONCE", 5)  # several rounds
    corpus = write_text(tmp_path / "corpus.jsonl", documents=12)
    store = prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4)
    expected: list[tuple[list[int], list[int]]] = []
    for document in read_documents([corpus]):
        ids = model.bind().text_ids([document.text], "passage")[0]
        expected += cut_document(ids, 16, 4)
    assert content(store) == expected
    assert store.lengths.tolist() == [len(text) for text, _ in expected]
    assert any(not following for _, following in expected)


def test_chunks_never_cross_documents(model: EmbeddingModel, tmp_path: Path) -> None:
    rows = [{"_id": str(i), "text": word * 9} for i, word in enumerate(("a", "b", "c"))]
    store = prepare_chunks(tmp_path / "chunks", [write_lines(tmp_path / "c.jsonl", rows)], model, 4, 1)
    for text, following in content(store):
        assert len(set(model.tokenizer.decode([*text, *following]))) == 1


def test_titles_are_joined_as_the_contract_says(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [{"_id": "1", "title": "Sky", "text": "is blue"}])
    store = prepare_chunks(tmp_path / "chunks", [corpus], model, 64, 1)
    assert model.tokenizer.decode(store[0].text) == "Sky is blue"


def test_prepared_chunks_are_read_again_without_the_corpus(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl", documents=3)
    first = content(prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4))
    corpus.unlink()
    assert content(prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4)) == first


@pytest.mark.parametrize("name", ["tokens.bin", "chunks.bin"])
def test_damaged_chunks_are_refused(model: EmbeddingModel, tmp_path: Path, name: str) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl", documents=3)
    prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4)
    path = tmp_path / "chunks" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=rf"{name}: is damaged.*delete .*chunks"):
        prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4)


def test_an_unfinished_preparation_is_done_again(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl", documents=3)
    first = content(prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4))
    (tmp_path / "chunks" / "chunks.json").unlink()
    (tmp_path / "chunks" / "tokens.bin").write_bytes(b"\0" * 8)
    assert content(prepare_chunks(tmp_path / "chunks", [corpus], model, 16, 4)) == first


def test_a_corpus_without_long_texts_is_refused(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "short.jsonl", [{"_id": "1", "text": "sky"}])
    with pytest.raises(DataError, match=r"short.jsonl: no text of 50 tokens or more; lower --min-chunk-length"):
        prepare_chunks(tmp_path / "chunks", [corpus], model, 64, 50)


def test_a_bad_row_is_named(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text('{"_id": "1", "text": "the sky is blue"}\n{"_id": "2", "text": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: "):
        prepare_chunks(tmp_path / "chunks", [corpus], model, 8, 1)


def test_the_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, second = tmp_path / "a" / "x.jsonl", tmp_path / "y.jsonl"
    first.write_text("same")
    second.write_text("same")
    assert fingerprint([first]) == fingerprint([second]) == fingerprint([tmp_path / "a"])
    second.write_text("else")
    assert fingerprint([first]) != fingerprint([second])
    with pytest.raises(DataError, match="no such file or folder"):
        fingerprint([tmp_path / "missing"])


def test_token_ids_above_sixteen_bits_survive(tmp_path: Path) -> None:
    ids = np.array([1, 70_000, 2**31], dtype="<u4")
    (tmp_path / "tokens.bin").write_bytes(ids.tobytes())
    (tmp_path / "chunks.bin").write_bytes(np.array([[0, 2, 3]], dtype="<i8").tobytes())
    assert content(ChunkStore(tmp_path)) == [([1, 70_000], [2**31])]
