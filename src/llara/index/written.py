"""How a file of FAISS is published: FAISS itself says nothing of a full disk, so the bytes pass through our hands."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llara.errors import StorageError
from llara.files import FileRecord, disk_errors, publish_file, reserve, temporary_path

_CHUNK = 1 << 20  # bytes that FAISS hands over at once


def write_index(index: Any, path: Path) -> FileRecord:
    """Publishes an open FAISS index as a file; returns its record.

    It is written out twice, first to nowhere: so its size is known and reserved before the first byte, and its checksum
    before it is on disk.

    Raises:
        StorageError: A full disk, or bytes on it that are not those which FAISS gave.
    """
    size, digest = 0, hashlib.sha256()

    def count(chunk: bytes) -> None:
        nonlocal size
        size += len(chunk)
        digest.update(chunk)

    _give(index, count)
    staged = temporary_path(path)
    try:
        with disk_errors(path, size), staged.open("wb") as file:
            reserve(file.fileno(), size)
            _give(index, file.write)
            file.flush()
            on_disk = os.fstat(file.fileno()).st_size
        if on_disk != size:
            raise StorageError(path, f"only {on_disk:,} of {size:,} bytes reached the disk")
        record = publish_file(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    if record.sha256 != digest.hexdigest():
        raise StorageError(path, "was written to the disk otherwise than FAISS gave it; build the index again")
    return record


def _give(index: Any, take: Callable[[bytes], object]) -> None:
    """Hands the bytes of an index over in order. What `take` raises is raised here, and not lost inside FAISS."""
    import faiss

    raised: list[BaseException] = []

    def guarded(chunk: bytes) -> None:
        if not raised:
            try:
                take(chunk)
            except BaseException as error:  # kept, and raised as soon as FAISS has returned
                raised.append(error)

    faiss_any: Any = faiss  # its stubs know the C++ signatures only
    faiss_any.write_index(index, faiss_any.PyCallbackIOWriter(guarded, _CHUNK))
    if raised:
        raise raised[0]
