"""Several index folders searched as one, and documents that were deleted.

What a search returns is what one index over all the documents would return, wherever the parts themselves are exact:
scores depend on nothing but query and document, and the best of the parts' best are the best of all.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llara.encoding.arrays import npy_bytes, open_array, write_array
from llara.encoding.manifest import find_model
from llara.encoding.shards import Vectors
from llara.errors import StorageError
from llara.files import FileRecord, confined
from llara.index.base import IDS, Allowed, Asks, Floats, Ids, Index, Keeps, Manifest, Positions, TopK, best_rows
from llara.terms import Terms

PART = "part-{:05d}"  # folder of the documents that do not lie in the index folder itself
DELETED = (
    "deleted-{:05d}.npy"  # int64 [documents]: sorted positions; a new name each time, for the old one may be mapped
)
MANY = 16  # parts, from which on a search says that it takes longer for them


class JoinedIds:
    """The ids of several parts, one after the other."""

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> str:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._parts[part][position - int(self._starts[part])]


class PartedIndex:
    """An index whose documents lie in several parts, or of which some were deleted."""

    def __init__(self, folder: Path, manifest: Manifest, parts: Sequence[Index[Any]]) -> None:
        self.manifest, self.parts = manifest, tuple(parts)
        self.asks: Asks = parts[0].asks
        self.ids: Ids = JoinedIds([part.ids for part in parts])
        self.model = find_model(manifest.model_path, folder)
        self._starts = np.cumsum([0, *map(len, parts)])
        deleted = read_deleted(folder, manifest)
        self._live = live_documents(deleted, len(self)) if len(deleted) else None

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: Any, top_k: int, allowed: Allowed | None = None) -> TopK:
        """See `Index.search`; deleted documents are never allowed."""
        allowed = both(allowed, self._live)
        top_k = min(top_k, len(self) if allowed is None else allowed.count)
        found = list(self._search_parts(queries, top_k, allowed))
        if not found:
            return TopK(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64))
        scores, positions = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
        return best_rows(scores, positions, self.ids, top_k)

    def score(self, queries: Any, positions: Sequence[Positions]) -> list[Floats]:
        """See `Index.score`; documents that were deleted have their score, too."""
        scores = [np.zeros(len(each), np.float32) for each in positions]
        for part, start, stop in self.bounds():
            inside = [(each >= start) & (each < stop) for each in positions]
            here = [each[chosen] - start for each, chosen in zip(positions, inside, strict=True)]
            for row, found in enumerate(part.score(queries, here)):
                scores[row][inside[row]] = found
        return scores

    def stored(self, positions: Positions) -> Floats | Terms:
        """Returns what the parts hold of documents at rising positions, deleted ones too; see `Keeps`."""
        found: list[Any] = []
        for part, start, stop in self.bounds():
            here = positions[(positions >= start) & (positions < stop)] - start
            if len(here):
                assert isinstance(part, Keeps), "only types that keep their vectors need parts"
                found.append(part.stored(here))
        return Terms.join(found) if self.asks == "terms" else np.concatenate(found)

    def _search_parts(self, queries: Any, top_k: int, allowed: Allowed | None) -> Iterator[TopK]:
        for part, start, stop in self.bounds():
            here = None if allowed is None else Allowed.of(allowed.mask(start, stop))
            if here is None or here.count:
                scores, positions = part.search(queries, top_k, None if here and here.count == len(part) else here)
                yield TopK(scores, np.where(positions >= 0, positions + start, -1))

    def bounds(self) -> Iterator[tuple[Index[Any], int, int]]:
        """Yields each part with the positions of its first document, and of the one behind its last."""
        for part, (start, stop) in zip(self.parts, itertools.pairwise(self._starts.tolist()), strict=True):
            yield part, start, stop


def both(first: Allowed | None, second: Allowed | None) -> Allowed | None:
    """Returns the documents that are in both sets; None stands for all."""
    if first is None or second is None:
        return second if first is None else first
    return Allowed(first.bits & second.bits, first.total)


def live_documents(deleted: Positions, total: int) -> Allowed:
    """Returns all positions but the deleted ones."""
    mask = np.ones(total, np.bool_)
    mask[deleted] = False
    return Allowed.of(mask)


def read_deleted(folder: Path, manifest: Manifest) -> Positions:
    """Returns the positions of deleted documents, int64 [n], sorted; StorageError where the file is damaged."""
    if not manifest.deleted:
        return np.empty(0, np.int64)
    path = confined(folder, manifest.deleted)
    count = (manifest.files[manifest.deleted].bytes - npy_bytes(np.dtype("<i8"), (0,))) // 8
    deleted = np.array(open_array(path, "int64", (count,)))
    if len(deleted) and not (deleted[0] >= 0 and deleted[-1] < manifest.total and (np.diff(deleted) > 0).all()):
        raise StorageError(path, "is damaged: holds positions that no document has; rebuild the index")
    return deleted


def write_deleted(folder: Path, manifest: Manifest, deleted: Positions) -> tuple[str, FileRecord]:
    """Publishes the positions of deleted documents under a new name; returns the name and the record."""
    number = int(manifest.deleted[8:13]) + 1 if manifest.deleted else 1
    name = DELETED.format(number)
    return name, write_array(folder / name, deleted)


def part_of(vectors: Vectors, first: int, last: int) -> Vectors:
    """Returns the shards from `first` to `last` (exclusive) of a vectors folder, as a folder of their own would be."""
    entries = vectors.manifest["shards"][first:last]
    counts = {name: sum(entry[name] for entry in entries) for name in ("documents", "rejected")}
    return Vectors(vectors.folder, {**vectors.manifest, **counts, "shards": entries})


def vectors_fingerprint(vectors: Vectors) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """Returns what tells the fingerprint that a vectors folder had when it held only some of its shards."""
    return lambda entries: Vectors(vectors.folder, {**vectors.manifest, "shards": list(entries)}).fingerprint


def covered(
    entries: Sequence[Mapping[str, Any]],
    documents: int,
    source: str,
    fingerprint: Callable[[Sequence[Mapping[str, Any]]], str],
) -> int | None:
    """Returns how many of a folder's shards an index was built from, that holds so many documents.

    None where they are not the first ones: the folder has changed since, or is another. `fingerprint` is that of the
    folder with only some of its shards.
    """
    total = 0
    for number, entry in enumerate(entries, 1):
        total += entry["documents"]
        if total == documents and fingerprint(entries[:number]) == source:
            return number
        if total > documents:
            break
    return None


def cut_shards(vectors: Vectors, documents: int) -> list[Vectors]:
    """Cuts a vectors folder between shards, so that a part holds at most so many documents, but one shard or more."""
    bounds, held = [0], 0
    for number, entry in enumerate(vectors.manifest["shards"]):
        if held and held + entry["documents"] > documents:
            bounds.append(number)
            held = 0
        held += entry["documents"]
    bounds.append(len(vectors.manifest["shards"]))
    return [part_of(vectors, first, last) for first, last in itertools.pairwise(bounds)]


def same_documents(first: tuple[Path, Index[Any]], second: tuple[Path, Index[Any]]) -> str:
    """Says in what the documents of two open indexes, each with its folder, differ; empty where they are the same."""
    pairs = (first, second)
    counts = [len(index) for _, index in pairs]
    if counts[0] != counts[1]:
        return f"{counts[1]:,} documents against {counts[0]:,}"
    one, other = (list(_id_files(folder, index.manifest)) for folder, index in pairs)
    if [record for _, record in one] != [record for _, record in other] and not _same_bytes(one, other):
        return "their ids, or the order of them, differ"
    were, are = (all_deleted(folder, index.manifest) for folder, index in pairs)
    return "" if np.array_equal(were, are) else f"{len(are):,} of them deleted against {len(were):,}"


def id_lines(folder: Path, manifest: Manifest) -> Iterator[bytes]:
    """Yields the ids of an index, those of its parts after its own, each with its line break."""
    return _lines(list(_id_files(folder, manifest)))


def _id_files(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, FileRecord]]:
    if manifest.count:
        yield folder / IDS, manifest.files[IDS]
    for part in manifest.parts:
        yield from _id_files(folder / part["folder"], Manifest.read(folder / part["folder"]))


def _same_bytes(one: list[tuple[Path, FileRecord]], other: list[tuple[Path, FileRecord]]) -> bool:
    """Compares ids that are cut into files differently."""
    return all(first == second for first, second in itertools.zip_longest(_lines(one), _lines(other)))


def _lines(files: list[tuple[Path, FileRecord]]) -> Iterator[bytes]:
    for path, _ in files:
        with path.open("rb") as file:
            yield from file


def all_deleted(folder: Path, manifest: Manifest) -> Positions:
    """Returns the positions of documents that were deleted from an index or from its parts, int64 [n], sorted."""
    found, start = [read_deleted(folder, manifest)], manifest.count
    for part in manifest.parts:
        place = folder / part["folder"]
        found.append(start + all_deleted(place, Manifest.read(place)))
        start += part["count"]
    return np.unique(np.concatenate(found))
