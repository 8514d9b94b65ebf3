"""An index whose vectors are passages, searched for documents: a document scores as its best passage does.

    passages.documents.npy    int64 [passages]: the document of each vector, by its position
    passages.spans.npy        int64 [passages, 2]: the characters where the passage starts and stops in its text

These stand beside the files of the type, which holds a vector, or sparse vector, for every passage. Everything outside
counts documents: ids, positions, hits, and what a filter allows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llara.encoding.arrays import Array, npy_bytes, open_array, write_chunks, write_chunks_of
from llara.encoding.manifest import find_model
from llara.encoding.shards import Vectors
from llara.errors import StorageError
from llara.files import FileRecord
from llara.index.base import Allowed, Asks, Floats, Ids, Index, Keeps, Manifest, Positions, StoredIds, TopK
from llara.index.parts import PartedIndex
from llara.terms import Terms

DOCUMENTS, SPANS = "passages.documents.npy", "passages.spans.npy"
_SPARE = 16  # passages fetched beyond what the hits take on average; fourfold until there are documents enough
_BLOCK = 1 << 20  # passages looked at together

Span = tuple[int, int]


class Passage(NamedTuple):
    """The passage of a vector: the position of its document, which one of its passages it is, and its characters."""

    position: int
    number: int
    span: Span


class PassageIds:
    """The document's id for each passage."""

    def __init__(self, ids: Ids, documents: Positions) -> None:
        self._ids, self._documents = ids, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, row: int) -> str:
        return self._ids[int(self._documents[row])]


class PassageIndex:
    """Wraps the index of the passages. What that finds exactly, this does: documents in the order of best passages.

    The passages of a search come by score, ties by the id of the document; so the first passage of each document is
    its best, and the documents come in the order of hits.
    """

    def __init__(self, folder: Path, manifest: Manifest, inner: Index[Any], documents: Positions) -> None:
        self.manifest, self.inner = manifest, inner
        self.asks: Asks = inner.asks
        self.ids: Ids = StoredIds(folder, manifest.count)
        self.model = find_model(manifest.model_path, folder)
        self._documents = documents
        self._spans = open_array(folder / SPANS, "int64", (len(documents), 2))
        self._held: tuple[Allowed, Allowed] | None = None

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def origin(self) -> str:
        """Says which model the index was built with."""
        return f"it was built with the model {self.model}"

    def search(self, queries: Any, top_k: int, allowed: Allowed | None = None) -> TopK:
        """See `Index.search`."""
        rows = None if allowed is None else self._rows(allowed)
        total = len(self._documents) if rows is None else rows.count
        top_k = min(top_k, len(self) if allowed is None else allowed.count)
        top = TopK(np.full((len(queries), top_k), -np.inf, np.float32), np.full((len(queries), top_k), -1, np.int64))
        fetch = min(total, top_k * -(-len(self._documents) // len(self)) + _SPARE)
        if not fetch or not top_k:
            return top
        found = self.inner.search(queries, fetch, rows)
        for row in range(len(queries)):
            scores, positions, asked = found.scores[row], found.positions[row], fetch
            while not self._fill(top, row, scores, positions) and len(positions) == asked < total:
                asked = min(4 * asked, total)
                more = self.inner.search(part(queries, row, row + 1), asked, rows)
                scores, positions = more.scores[0], more.positions[0]
        return top

    def score(self, queries: Any, positions: Sequence[Positions]) -> list[Floats]:
        """See `Index.score`: of a document's passages the best counts."""
        bounds = [self._bounds(each) for each in positions]
        rows = [np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in each)]) for each in bounds]
        scores = self.inner.score(queries, rows)
        starts = [np.cumsum([0, *(stop - start for start, stop in each)])[:-1] for each in bounds]
        return [
            np.maximum.reduceat(of_rows, first) if len(first) else of_rows
            for of_rows, first in zip(scores, starts, strict=True)
        ]

    def best_passages(self, query: Any, positions: Positions) -> list[Span]:
        """Returns where the best passage for one query stands in the text of each document; the first of equal ones."""
        found = []
        for start, stop in self._bounds(positions):
            (scores,) = self.inner.score(query, [np.arange(start, stop)])
            first, last = self._spans[start + int(scores.argmax())].tolist()
            found.append((first, last))
        return found

    def some(self, positions: Positions) -> tuple[list[Passage], Floats | Terms]:
        """Returns one passage of each document at rising positions, not always its first, and what is kept of each."""
        passages, rows = [], []
        for turn, (position, bounds) in enumerate(zip(positions.tolist(), self._bounds(positions), strict=True)):
            number = turn % (bounds[1] - bounds[0])
            first, last = self._spans[bounds[0] + number].tolist()
            passages.append(Passage(position, number, (first, last)))
            rows.append(bounds[0] + number)
        assert isinstance(self.inner, Keeps), "Milvus takes no passages, and bm25 has none"
        return passages, self.inner.stored(np.array(rows, np.int64))

    def _fill(self, top: TopK, row: int, scores: Floats, positions: Positions) -> bool:
        """Fills in the hits of one query from passages, best first; tells whether there are as many as were asked for.

        Fewer passages than were asked for are all there are.
        """
        there = positions >= 0
        documents = self._documents[positions[there]]
        _, first = np.unique(documents, return_index=True)
        best = np.sort(first)[: top.scores.shape[1]]
        top.scores[row, : len(best)] = scores[there][best]
        top.positions[row, : len(best)] = documents[best]
        return len(best) == top.scores.shape[1] or not there.all()

    def _bounds(self, positions: Positions) -> list[tuple[int, int]]:
        """Returns the first passage of each document, and the one behind its last."""
        starts, stops = (np.searchsorted(self._documents, positions, side) for side in ("left", "right"))
        return list(zip(starts.tolist(), stops.tolist(), strict=True))

    def _rows(self, allowed: Allowed) -> Allowed:
        """Returns the passages of the documents that are allowed. Those of the last filter are remembered."""
        if self._held is None or self._held[0] is not allowed:
            blocks = range(0, len(self._documents), _BLOCK)  # a multiple of 8, so that each fills whole bytes
            bits = [_packed(allowed, self._documents[start : start + _BLOCK]) for start in blocks]
            self._held = (allowed, Allowed(np.concatenate(bits), len(self._documents)))
        return self._held[1]


def _packed(allowed: Allowed, documents: Positions) -> NDArray[np.uint8]:
    return np.packbits(allowed.holds(documents), bitorder="little")


def part(asked: Any, start: int, stop: int) -> Any:
    """Returns some of the queries that an index is searched with, whatever they are."""
    return asked.part(start, stop) if isinstance(asked, Terms) else asked[start:stop]


def best_passages(index: Index[Any], query: Any, positions: Positions) -> list[Span] | None:
    """Returns where one query's best passage stands in each document; None where the index knows no passages."""
    if isinstance(index, PassageIndex):
        return index.best_passages(query, positions)
    if isinstance(index, PartedIndex):
        return _best_of_parts(index, query, positions)
    return None


def _best_of_parts(index: PartedIndex, query: Any, positions: Positions) -> list[Span] | None:
    found: list[Span] = [(0, 0)] * len(positions)
    for opened, start, stop in index.bounds():
        here = np.flatnonzero((positions >= start) & (positions < stop))
        spans = best_passages(opened, query, positions[here] - start)
        if spans is None:
            return None
        for at, span in zip(here.tolist(), spans, strict=True):
            found[at] = span
    return found


def some_passages(index: Index[Any], positions: Positions) -> tuple[list[Passage], Floats | Terms]:
    """Returns what `PassageIndex.some` does, also of an index in parts."""
    if isinstance(index, PassageIndex):
        return index.some(positions)
    assert isinstance(index, PartedIndex)
    passages: list[Passage] = []
    kept: list[Any] = []
    for opened, start, stop in index.bounds():
        here = positions[(positions >= start) & (positions < stop)] - start
        if len(here):
            some, stored = some_passages(opened, here)
            passages += [each._replace(position=each.position + start) for each in some]
            kept.append(stored)
    return passages, Terms.join(kept) if index.asks == "terms" else np.concatenate(kept)


def write_passages(folder: Path, vectors: Vectors) -> dict[str, FileRecord]:
    """Writes which passages the vectors are; returns the records of the files."""
    count = vectors.count_rows()
    documents = (np.ascontiguousarray(table[:, 0]) for table in vectors.passages())
    spans = (np.ascontiguousarray(table[:, 1:]) for table in vectors.passages())
    return {
        DOCUMENTS: write_chunks(folder / DOCUMENTS, "int64", count, documents),
        SPANS: write_chunks_of(folder / SPANS, "int64", (count, 2), spans),
    }


def open_documents(folder: Path, manifest: Manifest) -> Positions | None:
    """Returns the document of each vector, int64 [passages]; None where each vector is a document.

    Raises:
        StorageError: The file is damaged.
    """
    if DOCUMENTS not in manifest.files:
        return None
    count = (manifest.files[DOCUMENTS].bytes - npy_bytes(np.dtype("<i8"), (0,))) // 8
    documents: Array = open_array(folder / DOCUMENTS, "int64", (count,))
    last = -1
    for start in range(0, count, _BLOCK):
        steps = np.diff(documents[start : start + _BLOCK], prepend=last)
        if not ((steps == 0) | (steps == 1)).all():
            break
        last = int(documents[min(start + _BLOCK, count) - 1])
    if last != manifest.count - 1:
        raise StorageError(folder / DOCUMENTS, "is damaged: it does not fit the manifest; rebuild the index")
    return documents
