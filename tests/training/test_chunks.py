"""Chunks: chained within a document, prepared once, in bounded memory, and never read when damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.data import read_documents
from llara.errors import DataError, StorageError
from llara.files import FileRecord, write_json_atomic
from llara.model import EmbeddingModel
from llara.training import prepare as prepare_module
from llara.training.chunks import TABLES, ChunkStore, fingerprint
from llara.training.cutting import parts_of, tokenise
from llara.training.prepare import prepare_chunks
from tests import tiny
from tests.reference.chunks import cut_document
from tests.training.helpers import adapt_config, write_lines, write_text


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model()


def prepare(folder: Path, corpus: Path, model: EmbeddingModel, **changes: Any) -> ChunkStore:
    return prepare_chunks(folder / "chunks", adapt_config(Path("base"), corpus, folder / "out", **changes), model)


def content(store: ChunkStore) -> list[tuple[list[int], list[int]]]:
    return [(store[i].text.tolist(), store[i].next_text.tolist()) for i in range(len(store))]


def sentences(tmp_path: Path, documents: int = 12, name: str = "corpus.jsonl") -> Path:
    """A corpus of documents of some sentences each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(documents):
        parts = [" ".join(rng.choice(["sky", "blue", "read", "file"], rng.integers(2, 9))) for _ in range(8)]
        rows.append({"_id": f"d{number}", "title": f"T{number}", "text": ". ".join(map(str.capitalize, parts)) + "."})
    return write_lines(tmp_path / name, rows)


@pytest.mark.parametrize("cut", ["sentence", "token"])
def test_the_store_holds_what_the_slow_twin_cuts(
    model: EmbeddingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    monkeypatch.setattr(prepare_module, "DOCUMENTS_AT_ONCE", 5)  # several rounds
    monkeypatch.setattr(prepare_module, "CHARACTERS_AT_ONCE", 300)
    corpus = sentences(tmp_path)
    store = prepare(tmp_path, corpus, model, cut=cut)
    expected: list[tuple[list[int], list[int]]] = []
    ids: list[str] = []
    frequency = np.zeros(len(model.tokenizer), dtype=np.int64)
    for document in read_documents([corpus]):
        text = model.contract.join_title(document.title, document.text)
        (tokens,) = tokenise(parts_of(text, sentences=cut == "sentence"), model.tokenizer)
        assert tokens.ids.tolist() == model.bind().text_ids([text], "passage")[0]
        assert bool(tokens.sentences) == (cut == "sentence")
        chunks = cut_document(tokens.ids.tolist(), 16, 4, tokens.sentences, tokens.lines)
        expected += chunks
        ids += [document.id] * len(chunks)
        for token in set(tokens.ids.tolist()):
            frequency[token] += 1
    assert content(store) == expected
    numbers = np.arange(len(store))
    assert store.lengths(numbers).tolist() == [len(text) for text, _ in expected]
    assert store.lengths(numbers[::-3]).tolist() == [len(text) for text, _ in expected[::-3]]
    assert store.ids(numbers) == ids
    assert store.chained == sum(1 for _, following in expected if following)
    assert store.documents == 12 and store.copies == 0
    assert store.document_frequency.tolist() == frequency.tolist()
    ranges = store.chunks_of(np.arange(12)).tolist()
    assert [end - first for first, end in ranges] == [ids.count(f"d{number}") for number in range(12)]
    assert any(not following for _, following in expected)


def test_chunks_end_with_sentences(model: EmbeddingModel, tmp_path: Path) -> None:
    store = prepare(tmp_path, sentences(tmp_path), model, chunk_length=60, min_chunk_length=1)
    texts = [model.tokenizer.decode(text) for text, _ in content(store)]
    assert len(texts) > 12 and all(text.endswith(".") for text in texts), texts


def test_chunks_never_cross_documents(model: EmbeddingModel, tmp_path: Path) -> None:
    rows = [{"_id": str(i), "text": word * 9} for i, word in enumerate(("a", "b", "c"))]
    corpus = write_lines(tmp_path / "c.jsonl", rows)
    store = prepare(tmp_path, corpus, model, chunk_length=4, min_chunk_length=1)
    for text, following in content(store):
        assert len(set(model.tokenizer.decode([*text, *following]))) == 1


def test_titles_are_joined_as_the_contract_says(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [{"_id": "1", "title": "Sky", "text": "is blue"}])
    store = prepare(tmp_path, corpus, model, chunk_length=64, min_chunk_length=1)
    assert model.tokenizer.decode(store[0].text) == "Sky is blue"


def test_a_tokenizer_that_cannot_tell_places_is_no_hindrance(
    model: EmbeddingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = sentences(tmp_path)
    fast = prepare(tmp_path, corpus, model, chunk_length=60, min_chunk_length=1)
    monkeypatch.setattr(type(model.tokenizer), "is_fast", False)
    slow = prepare(tmp_path / "slow", corpus, model, chunk_length=60, min_chunk_length=1)
    assert content(slow) == content(fast)  # this tokenizer joins nothing over the end of a sentence


# Copies and ids -----------------------------------------------------------------------------------------------------


def test_copies_are_left_out_and_counted(
    model: EmbeddingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "DOCUMENTS_AT_ONCE", 2)
    rows = [
        {"_id": "a", "text": "the sky is blue"},
        {"_id": "b", "text": "the sky is blue"},
        {"_id": "c", "text": "the sky is blue", "title": "Sky"},
        {"_id": "d", "text": "the sky is blue"},
        {"_id": "e", "text": "the sky is blue"},
        {"_id": "f", "text": "the sky is red"},
    ]
    corpus = write_lines(tmp_path / "c.jsonl", rows)
    store = prepare(tmp_path, corpus, model, min_chunk_length=1)
    assert store.ids(np.arange(len(store))) == ["a", "c", "f"]
    assert (store.documents, store.copies) == (3, 3)
    assert json.loads((tmp_path / "chunks" / "chunks.json").read_text())["copies"] == 3
    assert "3 of 6 documents are copies of others and left out" in capsys.readouterr().err
    assert not (tmp_path / "chunks" / "seen").exists()
    kept = prepare(tmp_path / "all", corpus, model, min_chunk_length=1, deduplicate=False)
    assert (len(kept), kept.documents, kept.copies) == (6, 6, 0)
    assert "copies" not in capsys.readouterr().err


def test_ids_may_repeat_or_be_missing(model: EmbeddingModel, tmp_path: Path) -> None:
    rows = [{"_id": "a", "text": "the sky is blue"}, {"_id": "a", "text": "read a file"}, {"text": "close the file"}]
    corpus = write_lines(tmp_path / "c.jsonl", rows)
    store = prepare(tmp_path, corpus, model, min_chunk_length=1)
    assert store.ids(np.arange(3)) == ["a", "a", f"{corpus}:3"]


# Durability ---------------------------------------------------------------------------------------------------------


def test_prepared_chunks_are_read_again_without_the_corpus(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl", documents=3)
    first = content(prepare(tmp_path, corpus, model))
    corpus.unlink()
    assert content(prepare(tmp_path, corpus, model)) == first


@pytest.mark.parametrize("name", TABLES)
def test_damaged_chunks_are_refused(model: EmbeddingModel, tmp_path: Path, name: str) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl", documents=3)
    prepare(tmp_path, corpus, model)
    path = tmp_path / "chunks" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=rf"{name}: is damaged.*delete .*chunks"):
        prepare(tmp_path, corpus, model)


def test_chunks_that_are_cut_while_they_are_read_are_noticed(model: EmbeddingModel, tmp_path: Path) -> None:
    store = prepare(tmp_path, write_text(tmp_path / "corpus.jsonl", documents=3), model)
    os.truncate(tmp_path / "chunks" / "tokens.bin", 8)
    with pytest.raises(StorageError, match=r"tokens.bin: ends at byte"):
        content(store)
    with pytest.raises(IndexError):
        store[len(store)]


def test_an_unfinished_preparation_is_done_again(model: EmbeddingModel, tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl", documents=3)
    first = content(prepare(tmp_path, corpus, model))
    (tmp_path / "chunks" / "chunks.json").unlink()
    (tmp_path / "chunks" / "tokens.bin").write_bytes(b"\0" * 8)
    shutil.copytree(tmp_path / "chunks", tmp_path / ".tmp-chunks")
    assert content(prepare(tmp_path, corpus, model)) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chunks", "corpus.jsonl"]


KILLED = """
import os, signal, sys
from pathlib import Path
from llara.training import prepare
from tests import tiny
from tests.training.helpers import adapt_config
folder, last = Path(sys.argv[1]), int(sys.argv[2])
add, seen = prepare.Writer.add, []
def counted(self, *arguments):
    seen.append(add(self, *arguments))
    if len(seen) == last:
        os.kill(os.getpid(), signal.SIGKILL)
prepare.Writer.add = counted
prepare.DOCUMENTS_AT_ONCE = 10
prepare.prepare_chunks(folder / "chunks", adapt_config(Path("b"), folder / "c.jsonl", folder / "out"), tiny.model())
"""


def test_a_killed_preparation_leaves_nothing_under_its_name_and_is_made_good(
    model: EmbeddingModel, tmp_path: Path
) -> None:
    corpus = write_text(tmp_path / "c.jsonl", documents=60)
    command = [sys.executable, "-c", KILLED, str(tmp_path), "35"]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-chunks", "c.jsonl"]
    made = content(prepare(tmp_path, corpus, model))
    assert made == content(prepare(tmp_path / "undisturbed", corpus, model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "chunks", "undisturbed"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"_id": "1", "text": "sky"}'], r"c.jsonl: no text of 50 tokens or more; lower --min-chunk-length"),
        (['{"_id": "1", "text": "the sky is blue"}', '{"_id": "2", "text": '], r"c.jsonl:2: broken JSON"),
        (['{"_id": "1", "text": "the sky is blue"}'] * 900 + ["[]"], r"c.jsonl:901: not a JSON object"),
    ],
)
def test_a_corpus_that_does_not_fit_is_named_and_leaves_nothing(
    model: EmbeddingModel, tmp_path: Path, lines: list[str], message: str
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, corpus, model, chunk_length=50, min_chunk_length=50)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_memory_does_not_grow_with_the_corpus(
    model: EmbeddingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "DOCUMENTS_AT_ONCE", 30)

    def peak(documents: int) -> int:
        folder = tmp_path / str(documents)
        folder.mkdir()
        corpus = write_text(folder / "corpus.jsonl", documents)
        tracemalloc.start()
        store = prepare(folder, corpus, model)
        assert len(store) > documents
        for numbers in np.random.default_rng(0).integers(len(store), size=(50, 32)):
            assert store.lengths(numbers).max() <= 16
            assert len([store[number] for number in numbers.tolist()]) == len(store.ids(numbers))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(4000) < 1.25 * peak(400)


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
    (tmp_path / "tokens.bin").write_bytes(np.array([1, 70_000, 2**31], dtype="<u4").tobytes())
    (tmp_path / "chunks.bin").write_bytes(np.array([[0, 2, 3, 0]], dtype="<i8").tobytes())
    (tmp_path / "documents.bin").write_bytes(np.array([[0, 0], [1, 3]], dtype="<i8").tobytes())
    (tmp_path / "ids.bin").write_bytes("é1".encode())
    (tmp_path / "frequency.bin").write_bytes(b"")
    record = {"files": {name: list(FileRecord(0, "")) for name in TABLES}, "documents": 1, "copies": 0, "chained": 1}
    write_json_atomic(tmp_path / "chunks.json", record)
    store = ChunkStore(tmp_path)
    assert content(store) == [([1, 70_000], [2**31])]
    assert store.ids([0]) == ["é1"]
