"""How an approximate index is made: its parameters, what it is trained on, and its files."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llara.config import IndexConfig
from llara.encoding.arrays import Array, open_array, write_array, write_chunks_of
from llara.errors import ConfigError, StorageError
from llara.files import TEMPORARY, FileRecord
from llara.index.base import Floats, Positions
from llara.index.copies import COPIES, Digests, without
from llara.index.flat import FILE
from llara.index.written import write_index
from llara.progress import Progress

VECTORS = "vectors.npy"
TYPES = ("hnsw", "ivfpq", "rabitq")
SAMPLE_BYTES = 1 << 30  # of vectors that train the lists and codes, at most
TRAIN = 64  # vectors per list that train the lists; FAISS asks for 39 or more
ROUNDS = 10  # of k-means
_LEAST_LISTS = 32  # looked into by default: with 8 of 256, 0.88 of MedQuAD's ten best were found, with 32 0.98
_BLOCK = 1 << 16  # vectors added at once, fewer where they take more than
_ADDED = 1 << 28  # bytes: a rotation holds them twice
_LENGTH_ERROR = 1e-3  # of vectors of length 1, in float16 or less
_TOGETHER = 32  # codes that FAISS compares in one step


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
        chosen = {"nlist": nlist, "nprobe": min(nlist, max(_LEAST_LISTS, nlist // 32))}
        problems = [f"--nlist: {nlist} lists for {count:,} vectors; give fewer"] if nlist > count else []
        if config.type == "rabitq":
            chosen |= {"rabitq_bits": config.rabitq_bits}
        else:
            bits = config.pq_bits or min(8, max(1, int(math.log2(max(count // 4, 2)))))
            chosen |= {"pq_m": config.pq_m or usual_pieces(dim, bits), "pq_bits": bits}
            if dim % chosen["pq_m"]:
                problems.append(f"--pq-m: {chosen['pq_m']} does not divide the vectors' size, {dim}")
            if config.pq_bits and 1 << bits > count:
                problems.append(f"--pq-bits: {bits} bits name {1 << bits} centroids, there are {count:,} vectors")
        if problems:
            raise ConfigError(problems)
        return cls(config.type, dim, {"dim": dim, "seed": config.seed, **chosen})

    @property
    def has_lists(self) -> bool:
        """Whether vectors are codes in lists, which are trained, and lie beside them as they are."""
        return self.type != "hnsw"

    @property
    def holds_codes(self) -> bool:
        """Whether FAISS copies the codes into memory as it opens the index: those that it compares in blocks."""
        return self.type == "rabitq" or (self.type == "ivfpq" and int(self.settings["pq_bits"]) == 4)

    def sample(self, count: int) -> int:
        """Returns how many of `count` vectors the lists and codes are learned from."""
        wanted = max(TRAIN * self.settings["nlist"], TRAIN << self.settings.get("pq_bits", 0))
        return int(min(count, wanted, max(SAMPLE_BYTES // (4 * self.dim), self.settings["nlist"])))

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
        index = self.unrotated(metric)
        return self._rotated(index) if self.type == "rabitq" else index

    def unrotated(self, metric: str) -> Any:
        """Returns the same without the rotation that comes before rabitq."""
        import faiss

        faiss_any: Any = faiss
        settings, dim, product = self.settings, self.dim, metric_number(metric)
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
        index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = settings["seed"], ROUNDS, 1
        return index

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


def usual_pieces(dim: int, bits: int) -> int:
    """Returns into how many pieces a vector is cut for PQ, each with a code of so many bits.

    With codes of five bits or more, a piece has four dimensions, and there are 128 pieces at most; with four or fewer
    it has two, and there are 256 at most, which take as much room. FAISS compares codes of four bits several times
    faster, and of 1M vectors of 256 dimensions it misses as few neighbours in this way as with eight bits; with pieces
    of four dimensions it missed a quarter (`benchmarks/index.py`).
    """
    each, most = (2, 256) if bits <= 4 else (4, 128)
    return max(pieces for pieces in range(1, min(most, max(1, dim // each)) + 1) if dim % pieces == 0)


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
    vectors at the same time see each other's links: there only with OMP_NUM_THREADS=1.
    """
    written = write_vectors(folder, shards, count, vector_dtype, shape)
    try:
        vectors = open_array(written.path, written.dtype, (count, shape.dim))
        index = shape.make(written.metric)
        if shape.has_lists:
            index.train(_sample(vectors, shape))
        else:
            vectors = without(written.path, vectors, written.copies[:, 0])
        _add(index, vectors, shown)
        if shown:
            shown.advance(len(written.copies))
        files = {FILE: write_index(index, folder / FILE)}
        if len(written.copies):
            files[COPIES] = write_array(folder / COPIES, written.copies)
    finally:
        if not shape.has_lists:
            written.path.unlink(missing_ok=True)
    made = {**shape.settings, "vector_dtype": written.dtype, "metric": written.metric, "copies": len(written.copies)}
    return files | ({VECTORS: written.record} if shape.has_lists else {}), made


class Written(NamedTuple):
    """The vectors on disk, and what they turned out to be."""

    path: Path
    record: FileRecord
    dtype: str
    metric: str
    """How FAISS is to compare them, ip or l2."""
    copies: Positions
    """Those that a graph does not link, int64 [copies, 2]: see `llara.index.copies`. Empty for lists."""


def write_vectors(folder: Path, shards: Iterable[Array], count: int, vector_dtype: str, shape: Shape) -> Written:
    """Writes the vectors that an index is made from; see `write_faiss`. A graph holds them itself, in float32."""
    dtype = vector_dtype if shape.has_lists else "float32"
    path = folder / (VECTORS if shape.has_lists else f"{TEMPORARY}{VECTORS}")
    lengths, digests = _Lengths(), Digests()

    def looked_at() -> Iterator[Array]:
        for shard in shards:
            lengths.look(folder, shard)
            if not shape.has_lists:
                digests.look(shard)
            yield shard

    record = write_chunks_of(path, dtype, (count, shape.dim), looked_at())
    # Vectors of length 1 stand in the same order by either. Those of texts lie in a narrow cone: what a code errs by
    # then hides the differences between products, but not those between distances, which are as small.
    return Written(path, record, dtype, "l2" if shape.has_lists and lengths.are_one else "ip", digests.table())


class _Lengths:
    """Looks at the vectors that pass by: whether they are finite, and whether all have length 1."""

    are_one = True

    def look(self, folder: Path, shard: Array) -> None:
        if not np.isfinite(shard).all():
            raise StorageError(folder, "the vectors hold values that are not finite; encode the corpus again")
        lengths = np.linalg.norm(shard.astype(np.float32), axis=1)
        self.are_one &= bool((np.abs(lengths - 1) < _LENGTH_ERROR).all())


def metric_number(name: str) -> int:
    """Returns FAISS' number for ip or l2."""
    import faiss

    return int(faiss.METRIC_L2 if name == "l2" else faiss.METRIC_INNER_PRODUCT)


def _sample(vectors: Array, shape: Shape) -> Floats:
    """Returns the vectors that lists and codes are learned from, drawn with the seed, in the order of the documents."""
    wanted = shape.sample(len(vectors))
    rng = np.random.default_rng(shape.settings["seed"])
    sample = np.asarray(vectors[np.sort(rng.choice(len(vectors), wanted, replace=False))], np.float32)
    # FAISS wants as many as there are centroids; of a corpus of one document, it gets that twice.
    most = 1 << int(shape.settings.get("pq_bits", 0))
    return sample if len(sample) >= most else sample[np.arange(most) % len(sample)]


def add_step(dim: int) -> int:
    """Returns how many vectors are added to lists at once."""
    return max(1, min(_BLOCK, _ADDED // (4 * dim)))


def _add(index: Any, vectors: Array, shown: Progress | None) -> None:
    # hnsw takes all at once: the room for the vectors is then found once, and not by doubling it.
    step = len(vectors) if hasattr(index, "hnsw") else add_step(vectors.shape[1])
    for start in range(0, len(vectors), step):
        block = np.ascontiguousarray(vectors[start : start + step], np.float32)
        index.add(block)
        if shown:
            shown.advance(len(block))
