"""Arrays as `.npy` files whose header is known before the file is opened.

A reader knows type and shape from a checked record, so it compares the header with the one expected instead of parsing
it: a damaged header is an error, never a wrong shape. The mapping comes after the size check, so that no access to it
can end in SIGBUS.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llara.errors import StorageError
from llara.files import FileRecord, disk_errors, write_atomic

Array = np.ndarray[Any, np.dtype[Any]]


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Returns the header of format 1.0 for a C-ordered array; written out here so that no numpy version changes it."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    padding = -(10 + len(text) + 1) % 64
    body = (text + " " * padding + "\n").encode("ascii")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def npy_bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Returns the size of the file in bytes."""
    return len(npy_header(dtype, shape)) + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def write_array(path: Path, array: Array) -> FileRecord:
    """Publishes an array of little-endian numbers; returns the file's record."""
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    chunks = (npy_header(array.dtype, array.shape), array.reshape(-1).view(np.uint8).data)
    return write_atomic(path, chunks, size=npy_bytes(array.dtype, array.shape))


def write_chunks(path: Path, dtype: str, count: int, chunks: Iterable[Array]) -> FileRecord:
    """Publishes an array of `count` numbers that comes in parts, never whole in memory; returns the file's record."""
    return write_chunks_of(path, dtype, (count,), chunks)


def write_chunks_of(path: Path, dtype: str, shape: tuple[int, ...], chunks: Iterable[Array]) -> FileRecord:
    """Publishes an array whose rows come in parts; returns the file's record."""
    kind = np.dtype(dtype).newbyteorder("<")

    def parts() -> Iterator[bytes | memoryview]:
        yield npy_header(kind, shape)
        for chunk in chunks:
            yield np.ascontiguousarray(chunk, kind).reshape(-1).view(np.uint8).data

    return write_atomic(path, parts(), npy_bytes(kind, shape))


def open_array(path: Path, dtype: str, shape: tuple[int, ...], *, scattered: bool = False) -> Array:
    """Returns the array in a file, memory-mapped and read-only; another size or header is a `StorageError`.

    `scattered` is for rows that are read here and there: a system reads ahead of what is asked for, up to megabytes.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    header = npy_header(kind, shape)
    with disk_errors(path), path.open("rb") as file:
        size, expected = os.fstat(file.fileno()).st_size, npy_bytes(kind, shape)
        if size != expected:
            raise StorageError(path, f"is damaged: has {size:,} bytes where {expected:,} were written")
        if file.read(len(header)) != header:
            raise StorageError(path, f"is damaged: its header does not say {kind.name} {list(shape)}")
        mapped = np.memmap(file, dtype=kind, mode="r", offset=len(header), shape=shape)
    if scattered and hasattr(mmap, "MADV_RANDOM"):
        pages: Any = mapped.base
        pages.madvise(mmap.MADV_RANDOM)
    return mapped.view(np.ndarray)  # the subclass makes every access slower
