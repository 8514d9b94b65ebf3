"""Plain text as chained chunks of tokens, on disk: prepared once per run, then read at random in bounded memory.

A document is tokenised as a whole and cut at token boundaries into chunks of one length, each chained to the next one
of the same document as text and next text; never across documents. So a target never asks for tokens that the chunk it
names does not hold.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llara.data import read_documents
from llara.errors import DataError, StorageError
from llara.files import FileRecord, check_file, confined, read_json, sha256_file, write_atomic, write_json_atomic
from llara.model import EmbeddingModel
from llara.progress import Progress
from llara.records import Document

DOCUMENTS_AT_ONCE = 256


class Chunk(NamedTuple):
    """Token ids of a text, int64 [tokens], and of the text after it, empty where the document ends."""

    text: npt.NDArray[np.int64]
    next_text: npt.NDArray[np.int64]


class ChunkStore:
    """Chunks in `tokens.bin` (uint32) and `chunks.bin` (int64 rows of start, end, end of the next chunk)."""

    def __init__(self, folder: Path) -> None:
        self._tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        self._spans = np.memmap(folder / "chunks.bin", dtype="<i8", mode="r").reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per chunk, int64 [chunks]."""
        return np.asarray(self._spans[:, 1] - self._spans[:, 0], dtype=np.int64)

    @property
    def chained(self) -> int:
        """How many chunks have a next text."""
        return int((self._spans[:, 2] > self._spans[:, 1]).sum())

    def __getitem__(self, number: int) -> Chunk:
        start, end, next_end = (int(value) for value in self._spans[number])
        tokens = self._tokens
        return Chunk(tokens[start:end].astype(np.int64), tokens[end:next_end].astype(np.int64))


def fingerprint(paths: Sequence[Path]) -> str:
    """Returns a SHA-256 over the content of files, and of folders file by file in order of their names.

    Raises:
        DataError: A path is missing.
    """
    total = hashlib.sha256()
    for path in paths:
        if not path.exists():
            raise DataError(path, None, "no such file or folder")
        for file in sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]:
            total.update(sha256_file(file).encode())
    return total.hexdigest()


def prepare_chunks(
    folder: Path, paths: Sequence[Path], model: EmbeddingModel, chunk_length: int, min_length: int
) -> ChunkStore:
    """Tokenises a corpus into `folder`, unless an earlier run has done so, and opens it.

    Raises:
        DataError: A row of the corpus does not fit, or no chunk is long enough.
        StorageError: What an earlier run prepared is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "chunks.json"
    if done.is_file():
        _check(folder, done)
        return ChunkStore(folder)
    spans: list[npt.NDArray[np.int64]] = []
    with Progress("tokenise", None, "documents") as progress:
        tokens = write_atomic(
            folder / "tokens.bin", _tokens(read_documents(paths), model, chunk_length, min_length, spans, progress)
        )
    table = np.concatenate(spans) if spans else np.empty((0, 3), dtype=np.int64)
    if not len(table):
        names = ", ".join(str(path) for path in paths)
        raise DataError(names, None, f"no text of {min_length} tokens or more; lower --min-chunk-length")
    chunks = write_atomic(folder / "chunks.bin", table.astype("<i8").tobytes())
    write_json_atomic(done, {"tokens.bin": list(tokens), "chunks.bin": list(chunks)})
    return ChunkStore(folder)


def _check(folder: Path, done: Path) -> None:
    try:
        for name, entry in read_json(done).items():
            check_file(confined(folder, name), FileRecord(*entry), full=True)
    except StorageError as error:
        raise StorageError(error.path, f"{error.reason}; delete {folder} to prepare the text again") from error


def _tokens(
    documents: Iterable[Document],
    model: EmbeddingModel,
    chunk_length: int,
    min_length: int,
    spans: list[npt.NDArray[np.int64]],
    progress: Progress,
) -> Iterator[bytes]:
    """Yields the tokens of documents as bytes, and appends their chunks to `spans` on the way."""
    template, offset = model.bind(), 0
    stream = iter(documents)
    while batch := list(islice(stream, DOCUMENTS_AT_ONCE)):
        texts = [model.contract.join_title(document.title, document.text) for document in batch]
        for ids in template.text_ids(texts, "passage"):
            spans.append(cut(len(ids), offset, chunk_length, min_length))
            offset += len(ids)
            yield np.asarray(ids, dtype="<u4").tobytes()
        progress.advance(len(batch))


def cut(tokens: int, offset: int, chunk_length: int, min_length: int) -> npt.NDArray[np.int64]:
    """Returns the chunks of one document, int64 [chunks, 3]: start, end, end of the next chunk (end: there is none).

    A last chunk below `min_length` is only a next text.
    """
    starts = np.arange(0, tokens, chunk_length, dtype=np.int64)
    ends = np.minimum(starts + chunk_length, tokens)
    next_ends = np.minimum(ends + chunk_length, tokens)
    spans = np.stack([starts, ends, next_ends], axis=1) + offset
    return spans[ends - starts >= min_length]
