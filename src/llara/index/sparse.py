"""Exact search over sparse vectors through an inverted index, memory-mapped.

The documents are cut into segments, in their order. A segment holds its postings term by term, so that an index is
built in one pass over the vectors and searched in memory that does not grow with it: both hold one segment at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llara.encoding.arrays import Array, open_array, write_array, write_chunks
from llara.encoding.manifest import SPARSE, find_model
from llara.errors import DataError, ModelError, StorageError
from llara.files import FileRecord
from llara.index.base import Allowed, Asks, Floats, Ids, Manifest, Positions, StoredIds, TopK, best_first, stack
from llara.terms import Terms

POSTINGS = 1 << 24  # of a segment, at most: 128 MB; a single document may have more
PASSES = 3  # over the vectors: one counts, two write a file each, from its first byte to its last
STARTS, SEGMENTS = "postings.starts.npy", "segments.npy"
POSITIONS, WEIGHTS = "postings.positions.npy", "postings.weights.npy"


class SparseIndex:
    """An inverted index over sparse vectors: every document that shares a term with a query is scored.

    score(q, d) = sum over the terms of q of weight in q * weight in d, in float64 and rounded to float32. Terms are
    added in the order of their ids, so that equal documents tie exactly and a score depends on nothing else.
    """

    asks: Asks = "terms"

    def __init__(self, folder: Path, manifest: Manifest, ids: Ids | None = None) -> None:
        self.manifest = manifest
        self.ids: Ids = StoredIds(folder, manifest.count) if ids is None else ids
        self.model = find_model(manifest.model_path, folder)
        self.settings: dict[str, Any] = (manifest.model or {})[SPARSE]
        self.vocabulary = int(self.settings["vocabulary"])
        segments, postings = int(manifest.settings["segments"]), int(manifest.settings["postings"])
        self._path = folder
        self._bounds = open_array(folder / SEGMENTS, "int64", (segments + 1,))
        # [segments, terms + 1]: the postings of term t of segment s are `starts[s, t]` to `starts[s, t + 1]`.
        self._starts = open_array(folder / STARTS, "int64", (segments, self.vocabulary + 1))
        self._positions = open_array(folder / POSITIONS, "int32", (postings,))
        self._weights = open_array(folder / WEIGHTS, "float32", (postings,))
        if self._bounds[0] != 0 or self._bounds[-1] != manifest.count or (np.diff(self._bounds) < 1).any():
            raise StorageError(folder / SEGMENTS, "is damaged: it does not fit the manifest; rebuild the index")

    def __len__(self) -> int:
        return self.manifest.count

    def search(self, queries: Terms, top_k: int, allowed: Allowed | None = None) -> TopK:
        """Returns at most `top_k` of the allowed documents per query; hits are those that share a term with it."""
        top_k = min(top_k, len(self) if allowed is None else allowed.count)
        return stack([self._search_one(*queries.of(row), top_k, allowed) for row in range(len(queries))], top_k)

    def score(self, queries: Terms, positions: Sequence[Positions]) -> list[Floats]:
        """Returns the scores of given documents, per query int64 [n] to float32 [n]; 0 without a term in common."""
        return [self._score(*queries.of(row), each) for row, each in enumerate(positions)]

    def stored(self, positions: Positions) -> Terms:
        """Returns the terms of documents at rising positions, int64 [n]. Reads the segments that hold them whole."""
        rows: list[tuple[Array, Array]] = []
        for segment in np.unique(np.searchsorted(self._bounds, positions, side="right") - 1).tolist():
            begin, end = self._bounds[segment], self._bounds[segment + 1]
            starts = self._starts[segment]
            places = self._positions[starts[0] : starts[-1]]
            for row in positions[(positions >= begin) & (positions < end)] - begin:
                at = np.flatnonzero(places == row) + starts[0]
                ids, weights = np.searchsorted(starts, at, side="right") - 1, self._weights[at]
                order = np.lexsort((ids, -weights))
                rows.append((ids[order], weights[order]))
        return Terms.of_rows(rows)

    @property
    def origin(self) -> str:
        """Says which model the index was built with."""
        return f"it was built with the model {self.model}"

    def _search_one(
        self, terms: Array, weights: Array, top_k: int, allowed: Allowed | None
    ) -> tuple[Floats, Positions]:
        found: list[tuple[Floats, Positions]] = [(np.empty(0, np.float32), np.empty(0, np.int64))]
        for segment, scores in self._segments(terms, weights):
            hits = scores > 0
            if allowed is not None:
                hits &= allowed.mask(int(self._bounds[segment]), int(self._bounds[segment + 1]))
            near = np.flatnonzero(hits)
            if len(near) > top_k > 0:
                near = near[scores[near] >= np.partition(scores[near], -top_k)[-top_k]]
            found.append((scores[near], near + self._bounds[segment]))
        scores, positions = (np.concatenate(each) for each in zip(*found, strict=True))
        return best_first(scores, positions, self.ids, top_k)

    def _score(self, terms: Array, weights: Array, positions: Positions) -> Floats:
        given = np.zeros(len(positions), np.float32)
        for segment, scores in self._segments(terms, weights):
            here = (positions >= self._bounds[segment]) & (positions < self._bounds[segment + 1])
            given[here] = scores[positions[here] - self._bounds[segment]]
        return given

    def _segments(self, terms: Array, weights: Array) -> Iterator[tuple[int, Floats]]:
        """Yields each segment's number with the scores of its documents, float32 [documents of the segment]."""
        if len(terms) and not 0 <= terms.min() <= terms.max() < self.vocabulary:
            raise ModelError(f"the index knows {self.vocabulary:,} terms, the query has others: {self.origin}")
        order = np.argsort(terms, kind="stable")
        terms, weights = terms[order], weights[order].astype(np.float64)
        for segment in range(len(self._bounds) - 1):
            yield segment, self._segment_scores(segment, terms, weights)

    def _segment_scores(self, segment: int, terms: Array, weights: Array) -> Floats:
        from scipy.sparse import csc_array

        documents = int(self._bounds[segment + 1] - self._bounds[segment])
        first, last = self._starts[segment, terms], self._starts[segment, terms + 1]
        if not (first >= 0).all() or not (first <= last).all() or not (last <= len(self._positions)).all():
            raise self._damage(STARTS)
        spans = [slice(start, stop) for start, stop in zip(first.tolist(), last.tolist(), strict=True)]
        empty = np.empty(0, np.int32)
        positions = np.concatenate([empty, *(self._positions[span] for span in spans)])
        # scipy trusts them: one beyond the last document would be written to, wherever that is.
        if len(positions) and positions.view(np.uint32).max() >= documents:
            raise self._damage(POSITIONS)
        found = np.concatenate([empty.astype(np.float32), *(self._weights[span] for span in spans)])
        columns = np.concatenate([[0], np.cumsum(last - first)])
        postings = csc_array((found.astype(np.float64), positions, columns), shape=(documents, len(terms)))
        return np.asarray(postings @ weights, np.float32)

    def _damage(self, name: str) -> StorageError:
        return StorageError(self._path / name, "is damaged: it leads outside the index; rebuild the index")


class _Postings(NamedTuple):
    """The postings of one segment, term by term and then document by document: int32 and float32 [postings]."""

    positions: Array
    weights: Array


def write_sparse(
    folder: Path, shards: Callable[[], Iterable[Terms]], vocabulary: int, most: int = POSTINGS
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the files of a sparse index; returns their records and the settings.

    Args:
        folder: Where to.
        shards: Gives the sparse vectors in the order of the documents; called `PASSES` times. One segment is held in
            memory.
        vocabulary: Terms there are to choose from.
        most: Postings per segment.

    Raises:
        DataError: No document has a term.
    """
    documents, starts, postings = [0], [], 0
    for rows in cut(shards(), most):
        counts = np.bincount(np.concatenate([each.ids for each in rows]), minlength=vocabulary)
        starts.append(postings + np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))
        documents.append(documents[-1] + sum(map(len, rows)))
        postings += int(counts.sum())
    if not postings:
        raise DataError(folder, None, "no document has a term: the LM head gives no token of any text a logit above 0")

    def inverted() -> Iterator[_Postings]:
        return (_invert(rows, vocabulary) for rows in cut(shards(), most))

    files = {
        SEGMENTS: write_array(folder / SEGMENTS, np.array(documents, np.int64)),
        STARTS: write_array(folder / STARTS, np.stack(starts)),
        POSITIONS: write_chunks(folder / POSITIONS, "int32", postings, (each.positions for each in inverted())),
        WEIGHTS: write_chunks(folder / WEIGHTS, "float32", postings, (each.weights for each in inverted())),
    }
    return files, {"segments": len(starts), "postings": postings, "terms": vocabulary}


def cut(shards: Iterable[Terms], most: int) -> Iterator[list[Terms]]:
    """Yields the documents of each segment: as many in a row as have at most `most` terms together, but one or more."""
    held: list[Terms] = []
    room = most
    for terms in shards:
        start = 0
        while start < len(terms):
            stop = int(np.searchsorted(terms.starts, terms.starts[start] + room, side="right")) - 1
            if stop == start and held:
                yield held
                held, room = [], most
                continue
            stop = max(stop, start + 1)
            held.append(terms.part(start, stop))
            room = max(room - len(held[-1].ids), 0)
            start = stop
    if held:
        yield held


def _invert(rows: Sequence[Terms], vocabulary: int) -> _Postings:
    from scipy.sparse import csr_array

    joined = Terms.join(rows)
    by_document = csr_array((joined.weights, joined.ids, joined.starts), shape=(len(joined), vocabulary))
    by_term = by_document.tocsc()
    return _Postings(by_term.indices, by_term.data)
