"""Approximate inner-product search over vectors, through FAISS and memory-mapped: HNSW, IVF-PQ and RaBitQ.

    index.faiss     what FAISS searches: the graph with the vectors (hnsw), or lists of codes (ivfpq, rabitq)
    vectors.npy     the vectors [documents, dim] as they were encoded, where index.faiss holds only codes

FAISS finds candidates, whose scores are then computed again from the vectors, as a flat index computes them: a document
that both find has the same score in both, and what an approximation costs is recall alone.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara.config import IndexConfig
from llara.encoding.arrays import Array, open_array, write_chunks_of
from llara.errors import ConfigError, StorageError
from llara.files import TEMPORARY, FileRecord, check_file
from llara.index.base import Allowed, Floats, Ids, Manifest, Positions, TopK, best_first, best_rows
from llara.index.flat import FILE, OverVectors, check_queries, exact_scores, selector
from llara.index.written import write_index
from llara.progress import Progress

VECTORS = "vectors.npy"
TYPES = ("hnsw", "ivfpq", "rabitq")
EXACT = 4096  # documents (all, or those allowed) up to which every one is scored: as fast, and exact
SAMPLE_BYTES = 1 << 30  # of vectors that train the lists and codes, at most
TRAIN = 64  # vectors per list that train the lists; FAISS asks for 39 or more
_ROUNDS = 10  # of k-means
_SPARE = 16  # candidates beyond top_k, whatever the type
_MOST = 512  # candidates beyond top_k by default, however many hits are asked for
_WIDEST = 16  # how many times the effort grows where few documents are allowed
_BATCH = 1024  # queries per FAISS call, fewer where that many hits at once would take much memory
_CELLS = 1 << 22  # candidates' numbers that are in memory together
_BLOCK = 1 << 16  # vectors added, or scored, at once
_LENGTH_ERROR = 1e-3  # of vectors of length 1, in float16 or less
_TOGETHER = 32  # codes that FAISS compares in one step
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
        self._faiss = _open(folder / FILE, manifest)
        self._searched, self._rotation = _inner(self._faiss)
        if manifest.type == "hnsw":
            self._vectors: Array = _stored(self._faiss)
        else:
            dtype = manifest.settings["vector_dtype"]
            self._vectors = open_array(folder / VECTORS, dtype, (manifest.count, self.dim))

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
        step = max(1, min(_BATCH, _CELLS // fetch))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            self._search_batch(queries[part], fetch, TopK(top.scores[part], top.positions[part]), allowed)
        return self._search_all(queries, np.flatnonzero(top.positions[:, -1] < 0).tolist(), top, allowed)

    def _fetch(self, top_k: int) -> int:
        if self.effort.refine is not None:
            return max(1, self.effort.refine) * top_k
        share = 0 if self.manifest.type == "hnsw" else min(9 * top_k + _SPARE, _MOST)
        return top_k + _SPARE + share

    def _search_batch(self, queries: Floats, fetch: int, top: TopK, allowed: Allowed | None) -> None:
        """Fills in the hits of some queries; a row stays short where FAISS found too few."""
        rotated = queries if self._rotation is None else self._rotation.apply(queries)
        _, positions = self._searched.search(rotated, fetch, params=self._parameters(fetch, allowed))
        step = max(1, _CELLS // (fetch * self.dim))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            near = self._nearest(queries[rows], positions[rows], top.scores.shape[1] + _SPARE)
            found = exact_scores(self._vectors, queries[rows, None], np.maximum(near, 0))
            best = best_rows(
                np.where(near >= 0, found, -np.inf).astype(np.float32), near, self.ids, top.scores.shape[1]
            )
            top.scores[rows], top.positions[rows] = best

    def _nearest(self, queries: Floats, positions: Positions, count: int) -> Positions:
        """Returns the best candidates by their float32 scores, int64 [queries, count]; all where they are not more."""
        if positions.shape[1] <= count:
            return positions
        vectors = self._vectors[np.maximum(positions, 0)].astype(np.float32, copy=False)
        scores = np.matmul(vectors, queries[:, :, None])[..., 0]
        scores[positions < 0] = -np.inf
        kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        return np.take_along_axis(positions, kept, axis=1)

    def _parameters(self, fetch: int, allowed: Allowed | None) -> Any:
        import faiss

        faiss_any: Any = faiss  # its stubs know the C++ signatures only
        # Where few documents are allowed, those that are near are further apart.
        wider = 1.0 if allowed is None else min(_WIDEST, len(self) / max(allowed.count, 1))
        given: dict[str, Any] = {} if allowed is None else {"sel": selector(allowed)}
        if self.manifest.type == "hnsw":
            ef_search = self.effort.ef_search or self.manifest.settings["ef_search"]
            return faiss_any.SearchParametersHNSW(efSearch=max(fetch, round(ef_search * wider)), **given)
        nprobe = self.effort.nprobe or self.manifest.settings["nprobe"]
        nprobe = min(round(nprobe * wider), self.manifest.settings["nlist"])
        if self.manifest.type == "rabitq":
            return faiss_any.IVFRaBitQSearchParameters(nprobe=nprobe, qb=8, **given)
        return faiss_any.SearchParametersIVF(nprobe=nprobe, **given)

    def _search_all(self, queries: Floats, rows: Sequence[int], top: TopK, allowed: Allowed | None) -> TopK:
        """Fills in the hits of some queries from the scores of all allowed documents."""
        for row in rows:
            scores, positions = np.empty(0, np.float32), np.empty(0, np.int64)
            for block in self._blocks(allowed):
                found = exact_scores(self._vectors, queries[row], block)
                scores, positions = np.concatenate([scores, found]), np.concatenate([positions, block])
                scores, positions = best_first(scores, positions, self.ids, top.scores.shape[1])
            top.scores[row], top.positions[row] = scores, positions
        return top

    def _blocks(self, allowed: Allowed | None) -> Iterator[Positions]:
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            every = np.arange(start, stop)
            yield every if allowed is None else every[allowed.mask(start, stop)]


@dataclass(frozen=True)
class Shape:
    """The parameters of an approximate index: those given, and for the rest what its size asks for."""

    type: str
    dim: int
    settings: dict[str, Any]

    @classmethod
    def of(cls, config: IndexConfig, count: int, dim: int) -> "Shape":
        """Chooses for `count` vectors of dimension `dim`.

        Raises:
            ConfigError: A parameter that was given does not fit the vectors.
        """
        if config.type == "hnsw":
            chosen = {"hnsw_m": config.hnsw_m, "ef_construction": config.ef_construction, "ef_search": 64}
            return cls(config.type, dim, {"dim": dim, "seed": config.seed, **chosen})
        # Between 4 and 16 times the root of the number (FAISS' guidelines), as a power of two.
        usual = 1 << max(0, round(math.log2(4 * math.sqrt(count))))
        nlist = config.nlist or max(1, min(usual, count // TRAIN))
        chosen = {"nlist": nlist, "nprobe": min(nlist, max(8, nlist // 32))}
        problems = [f"--nlist: {nlist} lists for {count:,} vectors; give fewer"] if nlist > count else []
        if config.type == "rabitq":
            chosen |= {"rabitq_bits": config.rabitq_bits}
        else:
            bits = config.pq_bits or min(8, max(1, int(math.log2(max(count // 4, 2)))))
            chosen |= {"pq_m": config.pq_m or usual_pieces(dim), "pq_bits": bits}
            if dim % chosen["pq_m"]:
                problems.append(f"--pq-m: {chosen['pq_m']} does not divide the vectors' size, {dim}")
            if config.pq_bits and 1 << bits > count:
                problems.append(f"--pq-bits: {bits} bits name {1 << bits} centroids, there are {count:,} vectors")
        if problems:
            raise ConfigError(problems)
        return cls(config.type, dim, {"dim": dim, "seed": config.seed, **chosen})

    @property
    def bytes_per_vector(self) -> int:
        """Memory that building takes per vector, about; what training takes comes on top."""
        if self.type == "hnsw":
            return 4 * self.dim + 8 * int(self.settings["hnsw_m"]) + 32
        if self.type == "ivfpq":
            bits = self.settings["pq_m"] * self.settings["pq_bits"]
        else:
            bits = self.dim * self.settings["rabitq_bits"] + 192  # three or more numbers of 32 bits correct an estimate
        return int(2 * (bits // 8 + 8))  # with the position; the lists grow by doubling

    def make(self, metric: str) -> Any:
        """Returns the empty FAISS index; `metric` is ip or l2."""
        import faiss

        faiss_any: Any = faiss
        settings, dim, product = self.settings, self.dim, _metric(metric)
        if self.type == "hnsw":
            index = faiss_any.IndexHNSWFlat(dim, settings["hnsw_m"], product)
            index.hnsw.efConstruction = settings["ef_construction"]
            index.hnsw.rng = faiss_any.RandomGenerator(settings["seed"])
            return index
        lists = faiss_any.IndexFlat(dim, product)
        given = (lists, dim, settings["nlist"])
        if self.type == "ivfpq":
            # Codes of four bits are looked up in registers, 32 vectors at once.
            kind = faiss_any.IndexIVFPQFastScan if settings["pq_bits"] == 4 else faiss_any.IndexIVFPQ
            index = kind(*given, settings["pq_m"], settings["pq_bits"], product)
            index.pq.cp.seed, index.pq.cp.min_points_per_centroid = settings["seed"], 1
        else:
            index = faiss_any.IndexIVFRaBitQFastScan(*given, product, _TOGETHER, True, settings["rabitq_bits"])
        index.own_fields = True
        lists.this.disown()
        index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = settings["seed"], _ROUNDS, 1
        return index if self.type == "ivfpq" else self._rotated(index)

    def _rotated(self, index: Any) -> Any:
        """RaBitQ's guarantee is that of a random rotation (Gao & Long, SIGMOD 2024, section 3.1)."""
        import faiss

        faiss_any: Any = faiss
        rotation = faiss_any.RandomRotationMatrix(self.dim, self.dim)
        rotation.init(self.settings["seed"])
        whole = faiss_any.IndexPreTransform(rotation, index)
        whole.own_fields = True
        rotation.this.disown()
        index.this.disown()
        return whole


def usual_pieces(dim: int) -> int:
    """Returns into how many pieces a vector is cut for PQ: four dimensions each, 128 pieces at most."""
    return max(pieces for pieces in range(1, min(128, max(1, dim // 4)) + 1) if dim % pieces == 0)


def write_faiss(
    folder: Path, shards: Iterable[Array], count: int, vector_dtype: str, shape: Shape, shown: Progress | None = None
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the files of an approximate index; returns their records and the settings.

    Args:
        folder: Where to.
        shards: The vectors, float arrays [rows, dim], in the order of the documents.
        count: How many there are.
        vector_dtype: Their type on disk.
        shape: Type and parameters.
        shown: Told of the vectors that are in the index.

    The vectors go to disk first and are read from there, so that memory holds what FAISS searches and nothing else: see
    `Shape.bytes_per_vector`. The same vectors and seed give the same bytes, but for hnsw, where threads that link
    documents at the same time see each other's links: there only with OMP_NUM_THREADS=1.
    """
    kept = shape.type != "hnsw"
    dtype = vector_dtype if kept else "float32"
    path = folder / (VECTORS if kept else f"{TEMPORARY}{VECTORS}")
    lengths = _Lengths()
    record = write_chunks_of(path, dtype, (count, shape.dim), (lengths.look(folder, shard) for shard in shards))
    try:
        vectors = open_array(path, dtype, (count, shape.dim))
        # Vectors of length 1 stand in the same order by either. Those of texts lie in a narrow cone: what a code errs
        # by then hides the differences between products, but not those between distances, which are as small.
        metric = "l2" if kept and lengths.are_one else "ip"
        index = shape.make(metric)
        if kept:
            index.train(_sample(vectors, shape))
        _add(index, vectors, shown)
        files = {FILE: write_index(index, folder / FILE)}
    finally:
        if not kept:
            path.unlink(missing_ok=True)
    return files | ({VECTORS: record} if kept else {}), {**shape.settings, "vector_dtype": dtype, "metric": metric}


class _Lengths:
    """Looks at the vectors that pass by: whether they are finite, and whether all have length 1."""

    are_one = True

    def look(self, folder: Path, shard: Array) -> Array:
        if not np.isfinite(shard).all():
            raise StorageError(folder, "the vectors hold values that are not finite; encode the corpus again")
        lengths = np.linalg.norm(shard.astype(np.float32), axis=1)
        self.are_one &= bool((np.abs(lengths - 1) < _LENGTH_ERROR).all())
        return shard


def _metric(name: str) -> int:
    import faiss

    return int(faiss.METRIC_L2 if name == "l2" else faiss.METRIC_INNER_PRODUCT)


def _sample(vectors: Array, shape: Shape) -> Floats:
    """Returns the vectors that lists and codes are learned from, drawn with the seed, in the order of the documents."""
    wanted = max(TRAIN * shape.settings["nlist"], TRAIN << shape.settings.get("pq_bits", 0))
    wanted = min(len(vectors), wanted, max(SAMPLE_BYTES // (4 * shape.dim), shape.settings["nlist"]))
    rng = np.random.default_rng(shape.settings["seed"])
    sample = np.asarray(vectors[np.sort(rng.choice(len(vectors), wanted, replace=False))], np.float32)
    # FAISS wants as many as there are centroids; of a corpus of one document, it gets that twice.
    most = max(len(sample), 1 << int(shape.settings.get("pq_bits", 0)))
    return sample[np.arange(most) % len(sample)]


def _add(index: Any, vectors: Array, shown: Progress | None) -> None:
    # hnsw takes all at once: the room for the vectors is then found once, and not by doubling it.
    step = len(vectors) if hasattr(index, "hnsw") else _BLOCK
    for start in range(0, len(vectors), step):
        block = np.ascontiguousarray(vectors[start : start + step], np.float32)
        index.add(block)
        if shown:
            shown.advance(len(block))


def _stored(index: Any) -> Floats:
    """Returns the vectors inside an open HNSW index, float32 [n, dim], which it must outlive."""
    import faiss

    flat: Any = faiss.downcast_index(index.storage)
    vectors = faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d).reshape(flat.ntotal, flat.d)
    vectors.flags.writeable = False
    return np.asarray(vectors, np.float32)


def _inner(index: Any) -> tuple[Any, Any]:
    """Returns what is searched, and the rotation before it or None: so both take the same parameters."""
    import faiss

    if not hasattr(index, "chain"):
        return index, None
    faiss_any: Any = faiss
    return faiss_any.downcast_index(index.index), faiss_any.downcast_VectorTransform(index.chain.at(0))


def _open(path: Path, manifest: Manifest) -> Any:
    import faiss

    if manifest.type != "hnsw":
        # FAISS believes the sizes and ids in these files, and looks at those of a graph: one changed bit makes it ask
        # for gigabytes, or find documents that are none. The codes are small, and read in a moment.
        check_file(path, manifest.files[FILE], full=True)
    try:
        index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise StorageError(path, f"is damaged, FAISS cannot read it: {error}; rebuild the index") from error
    found = type(_inner(index)[0]).__name__
    sound = found in _KINDS[manifest.type] and index.metric_type == _metric(manifest.settings.get("metric", "ip"))
    if not sound or (index.ntotal, index.d) != (manifest.count, manifest.settings["dim"]):
        raise StorageError(path, "is damaged: it does not fit its manifest; rebuild the index")
    return index
