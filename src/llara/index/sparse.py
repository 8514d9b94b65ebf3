"""Exact search over sparse vectors through an inverted index, memory-mapped.

The documents are cut into segments, in their order. A segment holds its postings term by term, so that an index is
built in one pass over the vectors and searched in memory that does not grow with it: both hold one segment at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llara.encoding.arrays import Array, open_array, write_array
from llara.encoding.manifest import SPARSE, find_model
from llara.errors import DataError, ModelError, StorageError
from llara.files import FileRecord, write_atomic
from llara.index.base import Floats, Ids, Manifest, Positions, TopK, best_first, stack
from llara.encoding.arrays import npy_bytes, npy_header
from llara.terms import Terms

POSTINGS = 1 << 24  # of a segment, at most: 128 MB; a single document may have more
STARTS, SEGMENTS = "postings.starts.npy", "segments.npy"
POSITIONS, WEIGHTS = "postings.positions.npy", "postings.weights.npy"


class SparseIndex:
    """An inverted index over sparse vectors: every document that shares a term with a query is scored.

    score(q, d) = sum over the terms of q of weight in q * weight in d, in float64 and rounded to float32. Terms are
    added in the order of their ids, so that equal documents tie exactly and a score depends on nothing else.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest, self.ids = manifest, Ids(folder, manifest.count)
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

    def search(self, queries: Terms, top_k: int) -> TopK:
        """Returns at most `top_k` documents per query; only documents that share a term with the query are hits."""
        top_k = min(top_k, len(self))
        return stack([self._search_one(*queries.of(row), top_k) for row in range(len(queries))], top_k)

    def score(self, queries: Terms, positions: Sequence[Positions]) -> list[Floats]:
        """Returns the scores of given documents, per query int64 [n] to float32 [n]; 0 without a term in common."""
        return [self._score(*queries.of(row), each) for row, each in enumerate(positions)]

    @property
    def origin(self) -> str:
        """Says which model the index was built with."""
        return f"it was built with the model {self.model}"

    def _search_one(self, terms: Array, weights: Array, top_k: int) -> tuple[Floats, Positions]:
        found: list[tuple[Floats, Positions]] = [(np.empty(0, np.float32), np.empty(0, np.int64))]
        for segment, scores in self._segments(terms, weights):
            near = np.flatnonzero(scores > 0)
            if len(near) > top_k:
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
        if not (0 <= first).all() or not (first <= last).all() or not (last <= len(self._positions)).all():
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


class _Segment(NamedTuple):
    """Postings of some documents, term by term: `starts` int64 [terms + 1], the others one entry per posting."""

    documents: int
    starts: NDArray[np.int64]
    positions: NDArray[np.int32]
    weights: Floats


def write_sparse(
    folder: Path, shards: Iterable[Terms], count: int, vocabulary: int, most: int = POSTINGS
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the files of a sparse index from the sparse vectors of shards; returns their records and the settings.

    Args:
        folder: Where to.
        shards: Sparse vectors in the order of the documents; iterated twice, one segment in memory.
        count: Documents in all.
        vocabulary: Terms there are to choose from.
        most: Postings per segment.

    Raises:
        DataError: No document has a term.
    """
