"""JSON values on disk, read at random by their number: lines, and where each of them starts.

Values are only ever appended, and neither writing nor reading takes memory that grows with them.
"""

import array
import hashlib
import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from llara.data.lines import digest
from llara.errors import StorageError
from llara.files import FileRecord, disk_errors, free_bytes

_BUFFERED = 2**16  # starts of lines that are kept until they are written
_CACHE_KIB = 8192


class LineWriter:
    """Writes `NAME.jsonl` and `NAME.starts`, int64 [values + 1]; a context manager.

    The files are for a folder that is published as a whole once `close` has been called.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._paths = (folder / f"{name}.jsonl", folder / f"{name}.starts")
        self._files: list[BinaryIO] = []
        self._digests = [hashlib.sha256(), hashlib.sha256()]
        self._sizes = [0, 0]
        self._starts = array.array("q", [0])
        self.count = 0

    def __enter__(self) -> Self:
        with disk_errors(self._paths[0]):
            self._files = [path.open("wb") for path in self._paths]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._files:  # not closed: the block has failed, and so may this
            for file in self._files:
                try:
                    file.close()
                except OSError:
                    if error is None:
                        raise
            self._files = []

    def add(self, value: Any) -> int:
        """Appends a JSON value and returns its number, from 0."""
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._write(0, line)
        self._starts.append(self._sizes[0])
        if len(self._starts) >= _BUFFERED:
            self._flush_starts()
        self.count += 1
        return self.count - 1

    def close(self) -> dict[str, FileRecord]:
        """Writes what is left, and returns the record of each file by its name."""
        self._flush_starts()
        for path, file in zip(self._paths, self._files, strict=True):
            with disk_errors(path):
                file.close()
        self._files = []
        parts = zip(self._paths, self._sizes, self._digests, strict=True)
        return {path.name: FileRecord(size, checksum.hexdigest()) for path, size, checksum in parts}

    def _flush_starts(self) -> None:
        self._write(1, np.asarray(self._starts, dtype="<i8").tobytes())
        self._starts = array.array("q")

    def _write(self, which: int, data: bytes) -> None:
        with disk_errors(self._paths[which]):
            self._files[which].write(data)
        self._digests[which].update(data)
        self._sizes[which] += len(data)


class LineReader:
    """Reads what `LineWriter` wrote: `reader[number]` is a value. Safe to use from several threads."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.jsonl"
        self._starts = np.memmap(folder / f"{name}.starts", dtype="<i8", mode="r")
        # An empty file cannot be mapped.
        self._lines = np.memmap(self._path, dtype=np.uint8, mode="r") if len(self) else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"there is no value {number} among {len(self)}")
        start, stop = (int(value) for value in self._starts[number : number + 2])
        try:
            return json.loads(self._lines[start:stop].tobytes())
        except ValueError as error:
            raise StorageError(self._path, f"is damaged: value {number} is no JSON") from error


class Numbers:
    """The number of every id, in a table on disk; a context manager that owns `path`, a file, and removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)
        self._table = sqlite3.connect(self.path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "temp_store=MEMORY"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        self._table.execute("CREATE TABLE numbers (hash BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._table.execute("BEGIN")  # one transaction: it is scratch, and each of its own would be written out
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        self.path.unlink(missing_ok=True)

    def add(self, identifier: str, number: int) -> bool:
        """Enters an id; returns whether it is new. One that is not keeps the number it has."""
        entry = (digest(identifier.encode()), number)
        try:
            return self._table.execute("INSERT OR IGNORE INTO numbers VALUES (?, ?)", entry).rowcount == 1
        except sqlite3.Error as error:
            free = f"{free_bytes(self.path.parent):,} bytes are free"
            raise StorageError(self.path, f"the table of ids cannot be written ({error}); {free}") from error

    def find(self, identifier: str) -> int | None:
        """Returns the number of an id, None where it was not entered."""
        query = "SELECT number FROM numbers WHERE hash = ?"
        row = self._table.execute(query, (digest(identifier.encode()),)).fetchone()
        return None if row is None else int(row[0])
