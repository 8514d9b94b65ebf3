"""Opens plain and gzip files alike and reads them line by line, in bounded memory."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llara.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is not kept: it is reported as a bad row."""

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_SKIP_BYTES = 2**20


class Line(NamedTuple):
    """One line without its end. Where it is too long, `data` is empty and `oversize` says what was there."""

    number: int
    data: bytes
    oversize: bytes = b""


def plain_name(path: Path) -> str:
    """Returns a file's name in lower case, without `.gz`."""
    return path.name.lower().removesuffix(".gz")


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Opens a plain or gzip file, told apart by the first bytes, for a name may lie. DataError where it cannot be."""
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            # Every pass over the data opens its files anew, and what a pipe gave is gone then.
            raise DataError(path, None, "is no regular file but a pipe or a device; save it to a file first")
        raw = path.open("rb")
    except FileNotFoundError:
        raise DataError(path, None, "no such file") from None
    except OSError as error:
        raise DataError(path, None, f"cannot be read: {error.strerror}") from error
    with raw:
        if raw.peek(2)[:2] == _GZIP_MAGIC:
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                # No BufferedReader around it: where the file is cut, that would lose what was unpacked before.
                yield unpacked
        else:
            yield raw


def check_readable(path: Path) -> None:
    """Refuses, without reading it, what is neither a file nor a folder that can be read; DataError says why."""
    if path.is_dir():
        next(walk_files(path), None)
        return
    if not path.exists():
        raise DataError(path, None, "no such file or folder")
    with open_bytes(path):
        pass


def read_lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    r"""Yields the lines of a file, `\n` or `\r\n` and a UTF-8 byte order mark taken off.

    DataError for a file that is missing, empty, unreadable, or a gzip file that is cut or damaged (with the line).
    """
    number = 0
    with open_bytes(path) as stream:
        while True:
            try:
                line = _next_line(stream, number + 1, max_bytes)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(path, number + 1, f"the gzip file is cut or damaged here ({error})") from error
            except OSError as error:
                raise DataError(path, number + 1, f"cannot be read: {error.strerror or error}") from error
            if line is None:
                break
            number += 1
            yield line
    if number == 0:
        raise DataError(path, None, "the file is empty")


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder in the order of their relative paths as text; links to folders are not followed.

    Only the names of the folders that lead to the current file are in memory. DataError for one that cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            # "a/b" comes after "a.txt", so a folder is sorted by its name with the slash.
            entries = sorted((entry.name + "/" * entry.is_dir(follow_symlinks=False), entry.path) for entry in found)
    except OSError as error:
        raise DataError(folder, None, f"cannot be read: {error.strerror}") from error
    for name, path in entries:
        if name.endswith("/"):
            yield from walk_files(Path(path))
        elif os.path.isfile(path):  # noqa: PTH113 - a Path for each of many names takes its time
            yield Path(path)


def read_whole(path: Path, max_bytes: int = -1) -> bytes:
    """Returns a file's bytes, unpacked, at most `max_bytes` of them. DataError as `read_lines` has it; may be empty."""
    with open_bytes(path) as stream:
        try:
            return stream.read(max_bytes).removeprefix(_UTF8_BOM)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(path, None, f"the gzip file is cut or damaged ({error})") from error
        except OSError as error:
            raise DataError(path, None, f"cannot be read: {error.strerror or error}") from error


def digest(data: bytes) -> bytes:
    """Returns 16 bytes that stand for `data`: short enough to keep by the million, too long to collide."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _next_line(stream: BinaryIO | gzip.GzipFile, number: int, max_bytes: int) -> Line | None:
    # Two bytes more than the limit: room for the line end.
    data = stream.readline(max_bytes + 2)
    if not data:
        return None
    if number == 1:
        data = data.removeprefix(_UTF8_BOM)
    if not data.endswith(b"\n") and len(data) > max_bytes:
        return _oversize(stream, number, data)
    return Line(number, data.removesuffix(b"\n").removesuffix(b"\r"))


def _oversize(stream: BinaryIO | gzip.GzipFile, number: int, start: bytes) -> Line:
    # The rest is read past in pieces; size and checksum remain, so that a change of the row can be told.
    checksum, size, piece = hashlib.blake2b(start, digest_size=16), len(start), start
    while not piece.endswith(b"\n") and (piece := stream.readline(_SKIP_BYTES)):
        checksum.update(piece)
        size += len(piece)
    return Line(number, b"", b"%d %s" % (size, checksum.hexdigest().encode()))
