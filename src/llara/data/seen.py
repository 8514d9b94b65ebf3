"""Which rows repeat an earlier one, found in bounded memory: a table on disk of 16-byte hashes and first places."""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from llara.data.lines import digest
from llara.data.rows import Row
from llara.errors import StorageError
from llara.files import disk_errors, free_bytes

CACHE_KIB = 8192  # the table's whole share of memory, however large the corpus


class Place(NamedTuple):
    """Where an input row stands; lines count from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class FirstSeen:
    """Remembers the first place of every key; a context manager that owns `folder` and removes it at both ends.

    A key is any text, such as an id or a whole document. The table is scratch: a run that goes on fills it again from
    what it has finished, so it needs no journal. One thread at a time may use it.
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
            self._table = sqlite3.connect(self.folder / "seen.sqlite", isolation_level=None, check_same_thread=False)
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

    def add_all(self, keys: Iterable[tuple[str, Place]]) -> list[Place | None]:
        """Enters keys with their places in order; returns for each the first place of a key seen before, else None."""
        with self._errors():
            self._table.execute("BEGIN")
            found = [self._add(key, place) for key, place in keys]
            self._table.execute("COMMIT")
        return found

    def _add(self, key: str, place: Place) -> Place | None:
        hashed = digest(key.encode())
        entry = (hashed, self._file_number(place.path), place.line)
        if self._table.execute("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", entry).rowcount:
            return None
        query = "SELECT path, line FROM seen JOIN files ON file = files.id WHERE hash = ?"
        path, line = self._table.execute(query, (hashed,)).fetchone()
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
                self.folder, f"the table of what was seen cannot be written ({error}): {needs}; {advice}"
            ) from error


def place_of(row: Row) -> Place:
    """Returns where a row stands."""
    return Place(row.path, row.line)
