"""Plain text as chained chunks of tokens, on disk: prepared once per run, then read at random in bounded memory.

A document is tokenised as a whole, cut at the ends of sentences into chunks of at most one length, and each chunk is
chained to the next one of the same document as text and next text; never across documents. So a target never asks for
tokens that the chunk it names does not hold.

    tokens.bin     uint32, the tokens of all documents
    chunks.bin     int64 [chunks, 4]: start, end, end of the next chunk (end: there is none), document
    documents.bin  int64 [documents + 1, 2]: first chunk, start of the id in ids.bin
    ids.bin        the documents' ids in UTF-8
    frequency.bin  int64 [vocabulary]: documents that hold a token
    chunks.json    sizes, checksums and counts; written last
"""

import hashlib
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llara.data.lines import check_readable, walk_files
from llara.errors import StorageError
from llara.files import FileRecord, check_file, confined, disk_errors, read_json, sha256_file

TABLES = ("tokens.bin", "chunks.bin", "documents.bin", "ids.bin", "frequency.bin")
RECORD = "chunks.json"
Ints = npt.NDArray[np.int64]


class Chunk(NamedTuple):
    """Token ids of a text, int64 [tokens], and of the text after it, empty where the document ends."""

    text: Ints
    next_text: Ints


class ChunkStore:
    """The chunks in a folder that `prepare_chunks` has made.

    Attributes:
        documents: Documents that were counted, those without a chunk among them.
        chained: How many chunks have a next text.
        copies: Documents that were left out as copies of others.
        document_frequency: int64 [vocabulary], how many documents hold a token.
    """

    def __init__(self, folder: Path) -> None:
        record = read_json(folder / RECORD)
        self.documents, self.copies, self.chained = (int(record[name]) for name in ("documents", "copies", "chained"))
        self._chunks = _Table(folder / "chunks.bin", 4)
        self._documents = _Table(folder / "documents.bin", 2)
        self._tokens, self._ids = _Bytes(folder / "tokens.bin"), _Bytes(folder / "ids.bin")
        self.document_frequency: Ints = np.fromfile(folder / "frequency.bin", dtype="<i8").astype(np.int64)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> Chunk:
        start, end, next_end, _ = self._chunks.row(number)
        tokens = np.frombuffer(self._tokens.read(4 * start, 4 * next_end), dtype="<u4").astype(np.int64)
        return Chunk(tokens[: end - start], tokens[end - start :])

    def lengths(self, numbers: Ints) -> Ints:
        """Returns the tokens in each of some chunks, int64 [n]."""
        rows = self._chunks.rows(numbers)
        return rows[:, 1] - rows[:, 0]

    def ids(self, numbers: Sequence[int] | Ints) -> list[str]:
        """Returns the id of the document that each of some chunks comes from."""
        found = []
        for number in numbers:
            document = self._chunks.row(int(number))[3]
            (_, start), (_, end) = self._documents.row(document), self._documents.row(document + 1)
            found.append(self._ids.read(start, end).decode())
        return found

    def chunks_of(self, documents: Ints) -> Ints:
        """Returns the first chunk of each of some documents, and the one after its last, int64 [n, 2]."""
        return np.stack([self._documents.rows(documents)[:, 0], self._documents.rows(documents + 1)[:, 0]], axis=1)


def fingerprint(paths: Sequence[Path]) -> str:
    """Returns a SHA-256 over the content of files, and of folders file by file in order of their names.

    Raises:
        DataError: A path is missing, or is neither a file nor a folder.
    """
    total = hashlib.sha256()
    for path in paths:
        check_readable(path)  # the checksum of a pipe would take what is to be read
        for file in walk_files(path) if path.is_dir() else [path]:
            total.update(sha256_file(file).encode())
    return total.hexdigest()


def check_chunks(folder: Path) -> bool:
    """Tells whether a folder holds prepared chunks, each file with its checksum.

    Raises:
        StorageError: It does, and they are damaged.
    """
    if not (folder / RECORD).is_file():
        return False
    try:
        for name, entry in read_json(folder / RECORD)["files"].items():
            check_file(confined(folder, name), FileRecord(*entry), full=True)
    except StorageError as error:
        raise StorageError(error.path, f"{error.reason}; delete {folder} to prepare the text again") from error
    return True


class _Bytes:
    """A file read piece by piece at any place. Not mapped: what is touched of a map counts as the process's memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, end: int) -> bytes:
        with disk_errors(self.path):
            data = os.pread(self._descriptor, end - start, start)
        if len(data) != end - start:
            raise StorageError(self.path, f"ends at byte {self.size:,}, before byte {end:,}, where it was read")
        return data


class _Table(_Bytes):
    """Rows of `width` int64 values."""

    def __init__(self, path: Path, width: int) -> None:
        super().__init__(path)
        self.width = width

    def __len__(self) -> int:
        return self.size // (8 * self.width)

    def row(self, number: int) -> list[int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        bytes_per_row = 8 * self.width
        values: list[int] = np.frombuffer(
            self.read(number * bytes_per_row, (number + 1) * bytes_per_row), dtype="<i8"
        ).tolist()
        return values

    def rows(self, numbers: Ints) -> Ints:
        return np.array([self.row(number) for number in numbers.tolist()], dtype=np.int64).reshape(-1, self.width)
