"""Approximate inner-product search over vectors, through FAISS: HNSW, IVF-PQ and RaBitQ.

    index.faiss     what FAISS searches: the graph with the vectors (hnsw), or lists of codes (ivfpq, rabitq)
    vectors.npy     the vectors [documents, dim] as they were encoded, where index.faiss holds only codes
    copies.npy      of a graph: the documents whose vector an earlier one has; see copies.py

FAISS finds candidates, whose scores are then computed again from the vectors, as a flat index computes them: a document
that both find has the same score in both, and what an approximation costs is recall alone. A candidate is a vector; in
a graph it may stand for several documents.

Files are memory-mapped, but for codes that FAISS compares 32 at a time: those of rabitq, and of ivfpq with 4 bits. It
copies them as it opens the file, so an open index of these types holds all of `index.faiss` in memory. An ivfpq with
other codes over vectors of length 1 holds a table, `nlist * pq_m * 2**pq_bits` numbers of float32, where that takes no
more than 2 GiB.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara.encoding.arrays import Array, open_array
from llara.errors import StorageError
from llara.files import check_file
from llara.index.base import Allowed, Floats, Ids, Manifest, Positions, TopK, best_first
from llara.index.copies import Copies
from llara.index.flat import FILE, OverVectors, check_queries, exact_scores, selector
from llara.index.shape import TYPES, VECTORS, metric_number

EXACT = 4096  # documents (all, or those allowed) up to which every one is scored: as fast, and exact
_SPARE = 16  # candidates beyond top_k, whatever the type
_MOST = 512  # candidates beyond top_k by default, however many hits are asked for
_ROOM = 2  # times what is fetched that the lists hold which are looked into by default
_WIDEST = 16  # how many times the effort grows where few documents are allowed
_BATCH = 1024  # queries per FAISS call, fewer where that many hits at once would take much memory
_HITS = 1 << 22  # hits of one FAISS call, at most
_CELLS = 1 << 20  # numbers of candidates' vectors that a thread has in memory together, but for a single query's
_MOST_CELLS = 1 << 24  # the same of all threads
_BLOCK = 1 << 16  # vectors scored at once
_KINDS = {
    "hnsw": ("IndexHNSWFlat",),
    "ivfpq": ("IndexIVFPQ", "IndexIVFPQFastScan"),
    "rabitq": ("IndexIVFRaBitQFastScan",),
}


@dataclass(frozen=True)
class Effort:
    """How hard an approximate index looks; None: as the index says, by its type and size.

    Attributes:
        ef_search: hnsw: candidates that the walk through the graph keeps.
        nprobe: ivfpq, rabitq: lists that are looked into.
        refine: Candidates per hit whose scores are computed from the vectors.
    """

    ef_search: int | None = None
    nprobe: int | None = None
    refine: int | None = None

    def unread_by(self, types: Iterable[str]) -> list[str]:
        """Returns a problem for each setting that no index of these types reads."""
        read_by, found = {"ef_search": TYPES[:1], "nprobe": TYPES[1:], "refine": TYPES}, set(types)
        return [
            f"--{name.replace('_', '-')}: goes with an index of type {' or '.join(readers)}"
            for name, readers in read_by.items()
            if getattr(self, name) is not None and not set(readers) & found
        ]


class FaissIndex(OverVectors):
    """An approximate index. Fewer hits than asked for are filled up with an exact search."""

    def __init__(self, folder: Path, manifest: Manifest, effort: Effort | None = None, ids: Ids | None = None) -> None:
        super().__init__(folder, manifest, ids)
        self.effort = effort or Effort()
        self._copies = Copies.open(folder, int(manifest.settings.get("copies", 0)), manifest.count)
        self._faiss = _open(folder / FILE, manifest, self._copies.vectors)
        self._searched, self._rotation = inner(self._faiss)
        if manifest.type == "hnsw":
            self._vectors: Array = _stored(self._faiss)
        else:
            dtype = manifest.settings["vector_dtype"]
            self._vectors = open_array(folder / VECTORS, dtype, (manifest.count, self.dim), scattered=True)

    def search(self, queries: Floats, top_k: int, allowed: Allowed | None = None) -> TopK:
        """Returns about the `top_k` best of the allowed documents for each query; `queries` is float32 [queries, dim].

        ModelError when the queries have another dimension than the index.
        """
        queries = check_queries(queries, self.dim, self.origin)
        available = len(self) if allowed is None else allowed.count
        top_k = min(top_k, available)
        fetch = min(available, self._fetch(top_k))
        top = TopK(np.full((len(queries), top_k), -np.inf, np.float32), np.full((len(queries), top_k), -1, np.int64))
        if not top_k or not len(queries):
            return top
        if available <= EXACT:
            return self._search_all(queries, range(len(queries)), top, allowed)
        step = max(1, min(_BATCH, _HITS // fetch))
        nprobe, nlist = self._lists(fetch, available)
        rows = np.arange(len(queries))
        while True:
            parameters = self._parameters(fetch, nprobe, allowed)
            for start in range(0, len(rows), step):
                some = rows[start : start + step]
                found = self._search_batch(queries[some], top_k, fetch, parameters, allowed)
                top.scores[some], top.positions[some] = found
            rows = np.flatnonzero(top.positions[:, -1] < 0)  # too few documents lie in the lists that were looked into
            if not len(rows) or nprobe >= nlist:
                return self._search_all(queries, rows.tolist(), top, allowed)
            nprobe = min(4 * nprobe, nlist)

    def _lists(self, fetch: int, available: int) -> tuple[int, int]:
        """Returns how many lists are looked into at first, of how many; 0 of 0 in a graph."""
        if self.manifest.type == "hnsw":
            return 0, 0
        nlist = int(self.manifest.settings["nlist"])
        if self.effort.nprobe is not None:
            return min(round(self.effort.nprobe * self._wider(available)), nlist), nlist
        usual = round(int(self.manifest.settings["nprobe"]) * self._wider(available))
        # Lists of the usual length hold twice what is fetched, so that few queries have to be asked again.
        return min(max(usual, math.ceil(_ROOM * fetch * nlist / available)), nlist), nlist

    def _wider(self, available: int) -> float:
        """Returns how much further to look where few documents are allowed: those that are near are further apart."""
        return min(_WIDEST, len(self) / available)

    def _fetch(self, top_k: int) -> int:
        if self.effort.refine is not None:
            return max(1, self.effort.refine) * top_k
        share = 0 if self.manifest.type == "hnsw" else min(9 * top_k + _SPARE, _MOST)
        return top_k + _SPARE + share

    def _rows(self, positions: Positions) -> Positions:
        return self._copies.vectors_of(positions)

    def _search_batch(self, queries: Floats, top_k: int, fetch: int, parameters: Any, allowed: Allowed | None) -> TopK:
        """Returns the hits of some queries; a row stays short where FAISS found too few."""
        import faiss

        rotated = queries if self._rotation is None else self._rotation.apply(queries)
        _, candidates = self._searched.search(rotated, fetch, params=parameters)
        threads = max(1, min(faiss.omp_get_max_threads(), _MOST_CELLS // (fetch * self.dim)))
        step = max(1, min(math.ceil(len(queries) / threads), _CELLS // (fetch * self.dim)))
        blocks = [slice(start, start + step) for start in range(0, len(queries), step)]

        def score(rows: slice) -> TopK:
            near = self._nearest(queries[rows], candidates[rows], top_k + _SPARE)
            found = exact_scores(self._vectors, queries[rows, None], np.maximum(near, 0))
            scores = np.where(near >= 0, found, -np.inf).astype(np.float32)
            return self._copies.documents(scores, near, self.ids, top_k, allowed)

        if len(blocks) == 1 or threads == 1:  # to start a thread takes longer than to score a query
            parts = list(map(score, blocks))
        else:
            with ThreadPoolExecutor(threads) as pool:
                parts = list(pool.map(score, blocks))
        return TopK(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _nearest(self, queries: Floats, candidates: Positions, count: int) -> Positions:
        """Returns the best candidates by their float32 scores, int64 [queries, count]; all where they are not more."""
        if candidates.shape[1] <= count:
            return candidates
        vectors = self._vectors[np.maximum(candidates, 0)].astype(np.float32, copy=False)
        scores = np.matmul(vectors, queries[:, :, None])[..., 0]
        scores[candidates < 0] = -np.inf
        kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        return np.take_along_axis(candidates, kept, axis=1)

    def _parameters(self, fetch: int, nprobe: int, allowed: Allowed | None) -> Any:
        import faiss

        faiss_any: Any = faiss  # its stubs know the C++ signatures only
        given: dict[str, Any] = {} if allowed is None else {"sel": selector(self._copies.allowed(allowed))}
        if self.manifest.type == "hnsw":
            ef_search = self.effort.ef_search or self.manifest.settings["ef_search"]
            wider = 1.0 if allowed is None else self._wider(allowed.count)
            return faiss_any.SearchParametersHNSW(efSearch=max(fetch, round(ef_search * wider)), **given)
        if self.manifest.type == "rabitq":
            return faiss_any.IVFRaBitQSearchParameters(nprobe=nprobe, qb=8, **given)
        return faiss_any.SearchParametersIVF(nprobe=nprobe, **given)

    def _search_all(self, queries: Floats, rows: Sequence[int], top: TopK, allowed: Allowed | None) -> TopK:
        """Fills in the hits of some queries from the scores of all allowed documents."""
        for row in rows:
            scores, positions = np.empty(0, np.float32), np.empty(0, np.int64)
            for block in self._blocks(allowed):
                found = exact_scores(self._vectors, queries[row], self._rows(block))
                scores, positions = np.concatenate([scores, found]), np.concatenate([positions, block])
                scores, positions = best_first(scores, positions, self.ids, top.scores.shape[1])
            top.scores[row], top.positions[row] = scores, positions
        return top

    def _blocks(self, allowed: Allowed | None) -> Iterator[Positions]:
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            every = np.arange(start, stop)
            yield every if allowed is None else every[allowed.mask(start, stop)]


def _stored(index: Any) -> Floats:
    """Returns the vectors inside an open HNSW index, float32 [n, dim], which it must outlive."""
    import faiss

    flat: Any = faiss.downcast_index(index.storage)
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    vectors.flags.writeable = False
    return np.asarray(vectors, np.float32)


def inner(index: Any) -> tuple[Any, Any]:
    """Returns what is searched, and the rotation before it or None: so both take the same parameters."""
    import faiss

    if not hasattr(index, "chain"):
        return index, None
    faiss_any: Any = faiss
    return faiss_any.downcast_index(index.index), faiss_any.downcast_VectorTransform(index.chain.at(0))


def _open(path: Path, manifest: Manifest, count: int) -> Any:
    """Opens the FAISS file of a folder, which holds `count` vectors."""
    import faiss

    if manifest.type != "hnsw":
        # FAISS believes the sizes and ids in these files, and looks at those of a graph: one changed bit makes it ask
        # for gigabytes, or find documents that are none. The codes are small, and read in a moment.
        check_file(path, manifest.files[FILE], full=True)
    try:
        index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise StorageError(path, f"is damaged, FAISS cannot read it: {error}; rebuild the index") from error
    found = type(inner(index)[0]).__name__
    sound = found in _KINDS[manifest.type] and index.metric_type == metric_number(manifest.settings.get("metric", "ip"))
    if not sound or (index.ntotal, index.d) != (count, manifest.settings["dim"]):
        raise StorageError(path, "is damaged: it does not fit its manifest; rebuild the index")
    return index
