"""Makes the chunks of a corpus, once per run, in bounded memory: reading, tokenising and writing go on side by side."""

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from llara.config import AdaptConfig
from llara.data import Row, parse_document, read_rows
from llara.data.seen import FirstSeen, place_of
from llara.errors import DataError, StorageError
from llara.files import TEMPORARY, FileRecord, disk_errors, publish_folder, write_json_atomic
from llara.model import EmbeddingModel
from llara.progress import Progress, note
from llara.records import Document
from llara.training.chunks import RECORD, TABLES, ChunkStore, check_chunks
from llara.training.cutting import Part, Tokens, cut, join, parts_of, sentences_of, tokenise
from llara.training.prefetch import Prefetch

# What is tokenised at once: enough to keep a tokenizer's threads busy, little enough to need no memory of note.
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 2**18
BATCHES_AHEAD = 2


class Parted(NamedTuple):
    """Some documents: their ids, and the parts of all their texts with how many belong to each."""

    ids: list[str]
    parts: list[Part]
    counts: list[int]


class Tokenised(NamedTuple):
    """Some documents: their ids and tokens."""

    ids: list[str]
    tokens: list[Tokens]


def prepare_chunks(folder: Path, config: AdaptConfig, model: EmbeddingModel) -> ChunkStore:
    """Tokenises a corpus into `folder`, unless an earlier run has done so, and opens it.

    A run that is killed leaves no folder of that name; its successor starts again.

    Raises:
        DataError: A row of the corpus does not fit, or no chunk is long enough.
        StorageError: What an earlier run prepared is damaged, or the disk is full.
    """
    if not check_chunks(folder):
        staged = folder.with_name(TEMPORARY + folder.name)
        try:
            with disk_errors(folder):
                for leftover in (folder, staged):
                    if leftover.exists():
                        shutil.rmtree(leftover)
                staged.mkdir(parents=True)
            _write(staged, config, model)
            publish_folder(staged, folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return ChunkStore(folder)


def _write(folder: Path, config: AdaptConfig, model: EmbeddingModel) -> None:
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(FirstSeen(folder / "seen")) if config.deduplicate else None
        reader = Reader(config, model, seen)
        read = stack.enter_context(Prefetch(reader.next_batch, itertools.count(), BATCHES_AHEAD))
        made = stack.enter_context(
            Prefetch(lambda number: _tokenised(read.take(number), model), itertools.count(), BATCHES_AHEAD)
        )
        writer = stack.enter_context(Writer(folder, config, _vocabulary(model)))
        progress = stack.enter_context(Progress("tokenise", None, "documents"))
        for number in itertools.count():
            batch = made.take(number)
            if not batch.ids:
                break
            for document, tokens in zip(batch.ids, batch.tokens, strict=True):
                writer.add(document, tokens)
            progress.advance(len(batch.ids))
        if not writer.chunks:
            reason = f"no text of {config.min_chunk_length} tokens or more; lower --min-chunk-length"
            raise DataError(", ".join(map(str, config.corpus)), None, reason)
        writer.finish(reader.copies)
    if reader.copies:
        note(f"{reader.copies:,} of {reader.copies + writer.documents:,} documents are copies of others and left out")


def _vocabulary(model: EmbeddingModel) -> int:
    """Returns how many token ids there can be: the embeddings' rows, or the tokenizer's tokens if those are more."""
    return max(int(model.lm.get_input_embeddings().weight.shape[0]), len(model.tokenizer))


def _tokenised(batch: Parted, model: EmbeddingModel) -> Tokenised:
    groups = (tokenise(group, model.tokenizer) for group in _groups(batch.parts))
    tokens = itertools.chain.from_iterable(groups)
    return Tokenised(batch.ids, [join(list(itertools.islice(tokens, count))) for count in batch.counts])


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yields parts in order, as many at once as have the characters to be tokenised at once."""
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + len(part.text) > CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part.text)
    yield group


class Reader:
    """Reads documents, leaves out copies, and finds where each text may be cut.

    Attributes:
        copies: How many documents were left out so far.
    """

    def __init__(self, config: AdaptConfig, model: EmbeddingModel, seen: FirstSeen | None) -> None:
        self._rows = read_rows(config.corpus)
        self._contract, self._seen = model.contract, seen
        self._sentences, self._fast = config.cut == "sentence", bool(model.tokenizer.is_fast)
        self.copies = 0

    def next_batch(self, _: int) -> Parted:
        """Returns the next documents in order; none after the last."""
        ids: list[str] = []
        parts: list[list[Part]] = []
        while not ids and (rows := self._next_rows()):
            for document in self._without_copies(rows):
                ids.append(document.id)
                parts.append(self._parts(self._contract.join_title(document.title, document.text)))
        return Parted(ids, list(itertools.chain.from_iterable(parts)), [len(each) for each in parts])

    def _next_rows(self) -> list[Row]:
        rows: list[Row] = []
        size = 0
        while len(rows) < DOCUMENTS_AT_ONCE and size < CHARACTERS_AT_ONCE and (row := next(self._rows, None)):
            rows.append(row)
            size += len(row.data)
        return rows

    def _without_copies(self, rows: Sequence[Row]) -> list[Document]:
        # An id serves only to name a document in a message: none is needed, and repeated ones do no harm.
        documents = [parse_document(row, needs_id=False) for row in rows]
        if self._seen is None:
            return documents
        keys = [f"{document.title}\0{document.text}" for document in documents]  # no text holds a NUL
        firsts = self._seen.add_all(zip(keys, map(place_of, rows), strict=True))
        kept = [document for document, first in zip(documents, firsts, strict=True) if first is None]
        self.copies += len(documents) - len(kept)
        return kept

    def _parts(self, text: str) -> list[Part]:
        if self._sentences and not self._fast:
            return sentences_of(text)
        return parts_of(text, sentences=self._sentences)


class Writer:
    """Writes the files of a `ChunkStore`, in order, as documents come; a context manager.

    Attributes:
        documents: Documents so far.
        chunks: Chunks so far.
    """

    def __init__(self, folder: Path, config: AdaptConfig, vocabulary: int) -> None:
        self.folder, self.config = folder, config
        self.documents = self.chunks = self._chained = self._tokens = self._id_bytes = 0
        self._frequency = np.zeros(vocabulary, dtype=np.int64)
        self._files = {name: _File(folder / name) for name in TABLES}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, document_id: str, tokens: Tokens) -> None:
        """Adds one document."""
        config, count = self.config, len(tokens.ids)
        cuts = cut(count, tokens.sentences, tokens.lines, config.chunk_length, config.min_chunk_length)
        spans = chunks_of(cuts, config.min_chunk_length)
        self._files["documents.bin"].write(_int64([self.chunks, self._id_bytes]))
        rows = np.concatenate([spans + self._tokens, np.full((len(spans), 1), self.documents)], axis=1)
        self._files["chunks.bin"].write(rows.astype("<i8").tobytes())
        self._files["tokens.bin"].write(tokens.ids.astype("<u4").tobytes())
        self._files["ids.bin"].write(document_id.encode())
        self._frequency[np.unique(tokens.ids)] += 1
        self.chunks += len(spans)
        self._chained += int((spans[:, 2] > spans[:, 1]).sum())
        self._tokens += count
        self._id_bytes += len(document_id.encode())
        self.documents += 1

    def finish(self, copies: int) -> None:
        """Writes what stands at the end, and the record."""
        self._files["documents.bin"].write(_int64([self.chunks, self._id_bytes]))
        self._files["frequency.bin"].write(self._frequency.astype("<i8").tobytes())
        record: dict[str, Any] = {"files": {name: list(file.close()) for name, file in self._files.items()}}
        counts = {"documents": self.documents, "copies": copies, "chained": self._chained}
        write_json_atomic(self.folder / RECORD, record | counts)


class _File:
    """A file that is written from start to end, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self.path, self._size, self._digest = path, 0, hashlib.sha256()
        with disk_errors(path):
            self._file = path.open("wb", buffering=2**18)

    def write(self, data: bytes) -> None:
        with disk_errors(self.path):
            self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> FileRecord:
        with disk_errors(self.path):
            self._file.close()
            if (on_disk := self.path.stat().st_size) != self._size:
                raise StorageError(self.path, f"only {on_disk:,} of {self._size:,} bytes reached the disk")
        return FileRecord(self._size, self._digest.hexdigest())


def chunks_of(cuts: Sequence[int], shortest: int) -> npt.NDArray[np.int64]:
    """Returns the chunks of a document cut so, int64 [chunks, 3]: start, end, end of the next one (end: there is none).

    A piece below `shortest` is no chunk, only a next text.
    """
    starts, ends = np.array(cuts[:-1], dtype=np.int64), np.array(cuts[1:], dtype=np.int64)
    spans = np.stack([starts, ends, np.append(ends[1:], ends[-1:])], axis=1)
    return spans[ends - starts >= max(shortest, 1)]


def _int64(values: Sequence[int]) -> bytes:
    return np.array(values, dtype="<i8").tobytes()
