"""The document store: id, title, text and metadata of every accepted document, by position or by id.

Per shard:

    .docs          zlib blocks of JSON lines, one document a line
    .docs.npy      int64 [3, blocks + 1]: each block's first row, its offset in .docs, and its CRC-32
    .ids           UTF-8, one id per line
    .ids.npy       int64 [documents + 1]: where each line starts
    .lookup.npy    uint64 [2, documents]: sorted hashes of the ids, and the row of each

Positions number the accepted documents over all shards in order. Nothing here is read whole: files are memory-mapped
after their size was checked, and few shards are open at a time.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llara.data.lines import MAX_LINE_BYTES
from llara.encoding.arrays import Array, npy_header, open_array, write_array
from llara.encoding.manifest import Shard, open_sidecar, read_manifest
from llara.errors import StorageError
from llara.files import FileRecord, disk_errors, write_atomic
from llara.records import Document

BLOCK_DOCUMENTS = 32
BLOCK_BYTES = 1 << 16  # a block ends here too, so that one long neighbour does not slow down every read
MAX_ROW_BYTES = MAX_LINE_BYTES + (1 << 16)  # of an input row: a line, or a text with its id in front
# No row grows more than sixfold as it is stored: the worst is a control character of plain text, written as \u0001. The
# rest is names of fields and the checksum in a pair's id. So nothing that was written here unpacks to more than this.
MAX_DOCUMENT_BYTES = 6 * MAX_ROW_BYTES + 1024
MAX_BLOCK_BYTES = BLOCK_BYTES + MAX_DOCUMENT_BYTES  # a block ends with the line that makes it long
OPEN_SHARDS = 32  # each takes five file descriptors, of which a process often has 1,024


def document_line(document: Document) -> bytes:
    """Returns a document as one JSON line; text that is not valid Unicode is a `UnicodeEncodeError`."""
    fields: dict[str, Any] = {"id": document.id, "text": document.text}
    if document.title:
        fields["title"] = document.title
    if document.metadata:
        fields["metadata"] = dict(document.metadata)
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def write_document_files(folder: Path, name: str, documents: Sequence[Document]) -> dict[str, FileRecord]:
    """Publishes the files of one shard of the store; returns the record of each by suffix."""
    packed, table = _pack(documents)
    lines = [document.id.encode() + b"\n" for document in documents]
    starts = np.zeros(len(lines) + 1, np.int64)
    np.cumsum([len(line) for line in lines], out=starts[1:])
    hashes = np.array([_hash(document.id) for document in documents], np.uint64)
    order = np.argsort(hashes, kind="stable")
    lookup = np.stack([hashes[order], order.astype(np.uint64)])
    return {
        "docs": write_atomic(folder / f"{name}.docs", b"".join(packed)),
        "docs.npy": write_array(folder / f"{name}.docs.npy", table),
        "ids": write_atomic(folder / f"{name}.ids", b"".join(lines)),
        "ids.npy": write_array(folder / f"{name}.ids.npy", starts),
        "lookup.npy": write_array(folder / f"{name}.lookup.npy", lookup),
    }


def _pack(documents: Sequence[Document]) -> tuple[list[bytes], Array]:
    """Returns the compressed blocks and their table."""
    blocks: list[bytes] = []
    table: list[tuple[int, int, int]] = []
    lines: list[bytes] = []
    size = offset = 0
    for row, document in enumerate(documents, 1):
        lines.append(document_line(document))
        size += len(lines[-1])
        if len(lines) == BLOCK_DOCUMENTS or size >= BLOCK_BYTES or row == len(documents):
            blocks.append(zlib.compress(b"".join(lines)))
            table.append((row - len(lines), offset, zlib.crc32(blocks[-1])))
            offset, size, lines = offset + len(blocks[-1]), 0, []
    table.append((len(documents), offset, 0))
    return blocks, np.array(table, np.int64).T


def _hash(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def read_ids(folder: Path, shard: Shard) -> list[str]:
    """Returns all ids of one shard, in order."""
    return _StoredShard(folder, shard).ids(0, shard.documents) if shard.documents else []


def count_documents(folder: Path, shard: Shard) -> int:
    """Returns how many documents one shard holds, by reading every one."""
    return sum(1 for _ in _StoredShard(folder, shard).documents())


class DocumentStore:
    """Reads the documents of a complete folder; make one with `open`. A damaged file is a `StorageError`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = manifest["shards"]
        counts = [entry["documents"] for entry in self.entries]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._open: OrderedDict[int, _StoredShard] = OrderedDict()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens the store in a vectors folder or documents folder; one that is not complete is a `StorageError`."""
        return cls(folder, read_manifest(folder))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def get(self, position: int) -> Document:
        """Returns the document at a position."""
        shard, row = self._locate(position)
        return shard.document(row)

    def id(self, position: int) -> str:
        """Returns the id of the document at a position, without reading the document."""
        shard, row = self._locate(position)
        return shard.id(row)

    def ids(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Returns the ids of positions `start` to `stop` (exclusive; default: all)."""
        stop = len(self) if stop is None else min(stop, len(self))
        found: list[str] = []
        while (position := start + len(found)) < stop:
            shard, row = self._locate(position)
            found += shard.ids(row, min(shard.rows, row + stop - position))
        return found

    def ids_bytes(self) -> int:
        """Returns the size of all ids in bytes of UTF-8, with a line break behind each."""
        return sum(open_sidecar(self.folder, entry).files["ids"].bytes for entry in self.entries)

    def find(self, identifier: str) -> int | None:
        """Returns the position of an id, or None where no document has it."""
        for number, entry in enumerate(self.entries):
            row = self._shard(number).find(identifier) if entry["documents"] else None
            if row is not None:
                return int(self._starts[number]) + row
        return None

    def find_all(self, identifiers: Sequence[str]) -> NDArray[np.int64]:
        """Returns the position of each id, -1 where no document has it; every shard is opened at most once."""
        found = np.full(len(identifiers), -1, np.int64)
        hashes = np.array([_hash(each) for each in identifiers], np.uint64)
        for number, entry in enumerate(self.entries):
            missing = np.flatnonzero(found < 0)
            if not len(missing):
                break
            if not entry["documents"]:
                continue
            shard = self._shard(number)
            for at in missing[shard.may_hold(hashes[missing])].tolist():
                row = shard.find(identifiers[at])
                if row is not None:
                    found[at] = int(self._starts[number]) + row
        return found

    def get_all(self, identifiers: Sequence[str]) -> dict[str, Document]:
        """Returns the documents with these ids, by id; an id that no document has is left out."""
        positions = self.find_all(identifiers)
        # In the order of the file, so that each block is unpacked once for all the documents that are wanted of it.
        return {identifiers[at]: self.get(int(positions[at])) for at in np.argsort(positions) if positions[at] >= 0}

    def document(self, identifier: str) -> Document:
        """Returns the document with an id; an unknown one is a `StorageError`."""
        position = self.find(identifier)
        if position is None:
            raise StorageError(self.folder, f"holds no document with the id {identifier!r}")
        return self.get(position)

    def iter_documents(self) -> Iterator[Document]:
        """Yields all documents in the order of their positions, one block in memory at a time."""
        for number in range(len(self.entries)):
            yield from self._shard(number).documents()

    def _locate(self, position: int) -> tuple["_StoredShard", int]:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} documents")
        # The last shard that starts at or before the position: empty shards share a start with the one behind them.
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._shard(number), position - int(self._starts[number])

    def _shard(self, number: int) -> "_StoredShard":
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)
        shard = _StoredShard(self.folder, open_sidecar(self.folder, self.entries[number]))
        self._open[number] = shard
        return shard


class _StoredShard:
    """One shard of the store, open. Rows count from 0 within the shard."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.rows = shard.documents
        self.path = {suffix: shard.path(folder, suffix) for suffix in shard.files}
        blocks = (shard.files["docs.npy"].bytes - len(npy_header(np.dtype("<i8"), (3, 1)))) // 24
        self._table = open_array(self.path["docs.npy"], "int64", (3, blocks))
        self._starts = open_array(self.path["ids.npy"], "int64", (self.rows + 1,))
        self._lookup = open_array(self.path["lookup.npy"], "uint64", (2, self.rows))
        self._docs = _map(self.path["docs"], shard.files["docs"].bytes)
        self._ids = _map(self.path["ids"], shard.files["ids"].bytes)
        self._block: tuple[int, list[Document]] = (-1, [])

    def id(self, row: int) -> str:
        return self.ids(row, row + 1)[0]

    def ids(self, first: int, last: int) -> list[str]:
        start, stop = int(self._starts[first]), int(self._starts[last])
        lines = self._ids[start:stop] if 0 <= start < stop else b""
        # Lines are whole when they end with a line break, start behind another, and are as many as asked for.
        whole = lines.endswith(b"\n") and (start == 0 or self._ids[start - 1] == ord("\n"))
        try:
            if whole and len(lines) == stop - start and lines.count(b"\n") == last - first:
                return lines[:-1].decode().split("\n")
        except UnicodeDecodeError:
            pass
        raise self._damage("ids", f"rows {first} to {last - 1} are not whole lines")

    def may_hold(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tells for each hash of an id, uint64 [n], whether a document here has it; bool [n]."""
        at = np.searchsorted(self._lookup[0], hashes)
        return np.asarray(self._lookup[0][np.minimum(at, self.rows - 1)] == hashes, np.bool_)

    def find(self, identifier: str) -> int | None:
        wanted = np.uint64(_hash(identifier))
        first, last = (int(np.searchsorted(self._lookup[0], wanted, side=side)) for side in ("left", "right"))
        for row in self._lookup[1, first:last].tolist():
            if row >= self.rows:
                raise self._damage("lookup.npy", f"row {row} of {self.rows}")
            if self.id(row) == identifier:
                return int(row)
        return None

    def document(self, row: int) -> Document:
        number = int(np.searchsorted(self._table[0, :-1], row, side="right")) - 1
        if self._block[0] != number:
            self._block = (number, self._read_block(number))
        first, documents = int(self._table[0, number]), self._block[1]
        if not 0 <= row - first < len(documents):
            raise self._damage("docs.npy", f"row {row} is not where it says")
        return documents[row - first]

    def documents(self) -> Iterator[Document]:
        for number in range(self._table.shape[1] - 1):
            yield from self._read_block(number)

    def _read_block(self, number: int) -> list[Document]:
        if number < 0:
            raise self._damage("docs.npy", "no block holds the row")
        start, stop, crc = int(self._table[1, number]), int(self._table[1, number + 1]), int(self._table[2, number])
        packed = self._docs[start:stop] if 0 <= start < stop else b""
        if len(packed) != stop - start or zlib.crc32(packed) != crc:
            raise self._damage("docs", f"block {number} does not fit its checksum in {self.path['docs.npy'].name}")
        first, last = int(self._table[0, number]), int(self._table[0, number + 1])
        try:
            rows = [json.loads(line) for line in self._unpack(packed, number, last - first)]
            documents = [Document(r["id"], r["text"], r.get("title", ""), r.get("metadata", {})) for r in rows]
        except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damage("docs", f"block {number} cannot be read ({error})") from error
        # The table, the block and the ids must agree, or a damaged table would hand out a neighbour.
        if not 0 <= first < last <= self.rows or self.ids(first, last) != [document.id for document in documents]:
            raise self._damage("docs.npy", f"block {number} does not hold rows {first} to {last - 1}")
        return documents

    def _unpack(self, packed: bytes, number: int, count: int) -> list[bytes]:
        """Returns the `count` lines of a block. Memory stays bounded also where a block was made to fill it."""
        unpacker = zlib.decompressobj()
        lines = unpacker.decompress(packed, MAX_BLOCK_BYTES + 1)
        if len(lines) > MAX_BLOCK_BYTES:
            raise self._damage("docs", f"block {number} unpacks to more than {MAX_BLOCK_BYTES:,} bytes")
        if not unpacker.eof or not lines.endswith(b"\n") or lines.count(b"\n") != count:
            raise self._damage("docs", f"block {number} does not hold {count} whole lines")
        return lines[:-1].split(b"\n")

    def _damage(self, suffix: str, what: str) -> StorageError:
        return StorageError(self.path[suffix], f"is damaged: {what}; run llara verify on the folder")


def _map(path: Path, size: int) -> mmap.mmap | bytes:
    """Returns the content of a file, memory-mapped once its size was checked."""
    with disk_errors(path), path.open("rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise StorageError(path, f"is damaged: has {found:,} bytes where {size:,} were written")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
