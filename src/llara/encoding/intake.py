"""Which input rows become documents: those that parse, and of rows with one id the first.

Duplicates are found in bounded memory, through a table on disk of 16-byte hashes, each with where its id came first.
"""

import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from llara.data import Row, parse_document
from llara.encoding.documents import MAX_ROW_BYTES
from llara.errors import DataError, StorageError
from llara.files import disk_errors, free_bytes
from llara.records import Document

CACHE_KIB = 8192  # the table's whole share of memory, however large the corpus


class Place(NamedTuple):
    """Where an input row stands; lines count from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class FirstSeen:
    """Remembers the first place of every id; a context manager that owns `folder` and removes it at both ends.

    The table is scratch: it is filled again from the finished shards by a run that goes on, so it needs no journal.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: tuple[str, int] = ("", -1)

    def __enter__(self) -> Self:
        with disk_errors(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
        with self._errors():
            self._table = sqlite3.connect(self.folder / "ids.sqlite", isolation_level=None)
            for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "temp_store=MEMORY"):
                self._table.execute(f"PRAGMA {setting}")
            self._table.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
            self._table.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY, file INTEGER, line INTEGER) WITHOUT ROWID")
            self._table.execute("CREATE TABLE files (id INTEGER PRIMARY KEY, path BLOB UNIQUE)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        shutil.rmtree(self.folder, ignore_errors=kind is not None)

    def add_all(self, ids: Iterable[tuple[str, Place]]) -> list[Place | None]:
        """Enters ids with their places in order; returns for each the first place of an id seen before, else None."""
        with self._errors():
            self._table.execute("BEGIN")
            found = [self._add(identifier, place) for identifier, place in ids]
            self._table.execute("COMMIT")
        return found

    def _add(self, identifier: str, place: Place) -> Place | None:
        key = hashlib.blake2b(identifier.encode(), digest_size=16).digest()
        entry = (key, self._file_number(place.path), place.line)
        if self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", entry).rowcount:
            return None
        query = "SELECT path, line FROM seen JOIN files ON file = files.id WHERE hash = ?"
        path, line = self._table.execute(query, (key,)).fetchone()
        return Place(path.decode("utf-8", "surrogateescape"), line)

    def _file_number(self, path: str) -> int:
        # Rows of one file follow each other; a corpus of one file per document must not fill the memory with names.
        if path != self._file[0] or self._file[1] < 0:
            name = path.encode("utf-8", "surrogateescape")
            self._table.execute("INSERT OR IGNORE INTO files (path) VALUES (?)", (name,))
            number = self._table.execute("SELECT id FROM files WHERE path = ?", (name,)).fetchone()[0]
            self._file = (path, number)
        return self._file[1]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            needs = f"it needs about 60 bytes per document, {free_bytes(self.folder):,} bytes are free"
            advice = "make room; the same command then goes on where it stopped"
            raise StorageError(
                self.folder, f"the table of ids cannot be written ({error}): {needs}; {advice}"
            ) from error


def place_of(row: Row) -> Place:
    """Returns where a row stands."""
    return Place(row.path, row.line)


def sift_rows(batch: Sequence[Row], start: int, seen: FirstSeen) -> tuple[list[Document], list[dict[str, Any]]]:
    """Parts rows into documents and rejected rows; of rows with the same id the first in the corpus stays."""
    parsed: list[tuple[int, Row, Document]] = []
    rejected: list[dict[str, Any]] = []
    for number, row in enumerate(batch, start + 1):
        try:
            # A paragraph of SQuAD JSON is no line, so its length was not limited when it was read.
            if len(row.data) > MAX_ROW_BYTES:
                raise DataError(row.path, row.line, f"has {len(row.data):,} bytes; at most {MAX_ROW_BYTES:,} are kept")
            parsed.append((number, row, parse_document(row)))
        except DataError as error:
            rejected.append({"row": number, "file": row.path, "line": row.line, "reason": error.reason})
    firsts = seen.add_all([(document.id, place_of(row)) for _, row, document in parsed])
    documents: list[Document] = []
    for (number, row, document), first in zip(parsed, firsts, strict=True):
        if first is None:
            documents.append(document)
        else:
            where = {"row": number, "file": row.path, "line": row.line, "id": document.id}
            rejected.append({**where, "reason": f"duplicate id (first at {first})"})
    return documents, sorted(rejected, key=lambda entry: int(entry["row"]))


def digest_rows(batch: Sequence[Row]) -> str:
    """Returns the SHA-256 of raw rows: where they stand does not count, so a corpus may move."""
    digest = hashlib.sha256()
    for row in batch:
        digest.update(f"{row.kind} {len(row.data)}\n".encode())
        digest.update(row.data)
    return digest.hexdigest()
