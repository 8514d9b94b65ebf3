"""Counts again what an encoded corpus says of itself: the files of each shard, and all shards together.

Checksums tell that the files are as they were written; counts tell that what was written fits together.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llara.encoding.documents import count_documents
from llara.encoding.manifest import MANIFEST, REJECTED, Shard, open_sidecar
from llara.errors import StorageError
from llara.files import disk_errors


class Count(NamedTuple):
    """A number that a file says, beside what was counted."""

    path: Path
    what: str
    said: int
    counted: int


def check_counts(folder: Path, manifest: Mapping[str, Any]) -> Iterator[StorageError]:
    """Yields each count that is wrong in a complete folder whose checksums were found right.

    The vectors are no part of it: their number stands in the header that is compared when they are opened.
    """
    for count in _counts(folder, manifest):
        if count.said != count.counted:
            what = f"says {count.said:,} {count.what}, {count.counted:,} were counted"
            yield StorageError(count.path, f"{what}; delete the folder and make it again")


def count_lines(path: Path) -> int:
    """Returns the number of line breaks in a file."""
    with disk_errors(path), path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _counts(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Count]:
    rows = documents = rejected = 0
    for entry in manifest["shards"]:
        shard = open_sidecar(folder, entry)
        yield Count(shard.path(folder, "json"), "rows before the shard", shard.start, rows)
        yield from _shard_counts(folder, entry, shard)
        rows, documents = rows + shard.end - shard.start, documents + shard.documents
        rejected += len(shard.rejected)
    for what, counted in (("rows", rows), ("documents", documents), ("rejected", rejected)):
        yield Count(folder / MANIFEST, what, manifest[what], counted)
    yield Count(folder / MANIFEST, "rejected rows", manifest["rejected"], count_lines(folder / REJECTED))


def _shard_counts(folder: Path, entry: Mapping[str, Any], shard: Shard) -> Iterator[Count]:
    listed, own = folder / MANIFEST, shard.path(folder, "json")
    yield Count(listed, f"documents in {shard.name}", entry["documents"], shard.documents)
    yield Count(listed, f"rejected rows in {shard.name}", entry["rejected"], len(shard.rejected))
    yield Count(listed, f"rows up to the end of {shard.name}", entry["end"], shard.end)
    # Every input row is in exactly one of the two.
    yield Count(own, "rows", shard.end - shard.start, shard.documents + len(shard.rejected))
    yield Count(own, "ids", shard.documents, count_lines(shard.path(folder, "ids")))
    yield Count(own, "documents", shard.documents, count_documents(folder, shard))
