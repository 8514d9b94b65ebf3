"""Exact inner-product search over vectors, through FAISS and memory-mapped."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llara.encoding.arrays import Array
from llara.encoding.manifest import find_model
from llara.errors import ModelError, StorageError
from llara.files import FileRecord, write_atomic
from llara.index.base import Allowed, Asks, Floats, Ids, Manifest, Positions, StoredIds, TopK, best_first, stack

FILE = "index.faiss"
_BATCH = 1024  # queries per FAISS call, fewer where that many hits at once would take much memory
_CELLS = 1 << 24
_SPARE = 16  # candidates fetched beyond top_k at first; fourfold until the boundary is clear
_COUNT_AT, _SIZE_AT, _HEADER = 8, 37, 45  # where FAISS keeps two 64-bit numbers, and the length of its header


class OverVectors:
    """What indexes share that keep the vectors as they were encoded: `_vectors` [documents, dim], or see `_rows`."""

    asks: Asks = "vectors"
    _vectors: Array

    def __init__(self, folder: Path, manifest: Manifest, ids: Ids | None = None) -> None:
        self.manifest = manifest
        self.ids: Ids = StoredIds(folder, manifest.count) if ids is None else ids
        self.model = find_model(manifest.model_path, folder)
        self.dim = int(manifest.settings["dim"])

    def __len__(self) -> int:
        return self.manifest.count

    def score(self, queries: Floats, positions: Sequence[Positions]) -> list[Floats]:
        """Returns the exact scores of given documents, per query int64 [n] to float32 [n], as `search` gives them."""
        rows = map(self._rows, positions)
        return [exact_scores(self._vectors, query, each) for query, each in zip(queries, rows, strict=True)]

    def stored(self, positions: Positions) -> Floats:
        """Returns the vectors of documents, int64 [n] to float32 [n, dim]."""
        return np.array(self._vectors[self._rows(positions)], np.float32)

    def _rows(self, positions: Positions) -> Positions:
        """Returns in which rows of `_vectors` those of documents lie, int64 to int64 of the same shape."""
        return positions

    @property
    def origin(self) -> str:
        """Says which model the index was built with."""
        return f"it was built with the model {self.model}"


class FlatIndex(OverVectors):
    """An exact index: every query is compared with every vector.

    FAISS finds the candidates. Their scores are then computed again, in float64 and rounded to float32, so that they
    do not depend on the batch, the number of threads or the position of a document, and equal vectors tie exactly.
    """

    def __init__(self, folder: Path, manifest: Manifest, ids: Ids | None = None) -> None:
        super().__init__(folder, manifest, ids)
        self._max_norm = float(manifest.settings["max_norm"])
        self._faiss = _open(folder / FILE, manifest)
        self._vectors = _view(self._faiss)

    def search(self, queries: Floats, top_k: int, allowed: Allowed | None = None) -> TopK:
        """Returns the `top_k` best of the allowed documents for each query; `queries` is float32 [queries, dim].

        ModelError when the queries have another dimension than the index.
        """
        queries = check_queries(queries, self.dim, self.origin)
        available = len(self) if allowed is None else allowed.count
        top_k = min(top_k, available)
        rows: list[tuple[Floats, Positions]] = [(np.empty(0, np.float32), np.empty(0, np.int64))] * len(queries)
        pending, fetch = list(range(len(queries))), min(top_k + _SPARE, available)
        while pending and fetch:
            unclear: list[int] = []
            step = max(1, min(_BATCH, _CELLS // fetch))
            for start in range(0, len(pending), step):
                batch = pending[start : start + step]
                unclear += self._search_batch(queries, batch, top_k, fetch, rows, allowed)
            pending, fetch = unclear, min(4 * fetch, available)
        return stack(rows, top_k)

    def _search_batch(
        self,
        queries: Floats,
        batch: list[int],
        top_k: int,
        fetch: int,
        rows: list[tuple[Floats, Positions]],
        allowed: Allowed | None,
    ) -> list[int]:
        """Fills in `rows` of the queries in `batch`; returns those whose boundary needs more candidates to be clear."""
        unclear: list[int] = []
        found = self._faiss.search(queries[batch], fetch, params=_only(allowed))
        for row, scores, positions in zip(batch, *found, strict=True):
            floor = scores[top_k - 1] - self._margin(queries[row])
            if scores[-1] >= floor and fetch < (len(self) if allowed is None else allowed.count):
                unclear.append(row)
                continue
            near = positions[scores >= floor]
            rows[row] = best_first(exact_scores(self._vectors, queries[row], near), near, self.ids, top_k)
        return unclear

    def _margin(self, query: Floats) -> float:
        """How far below the k-th score of FAISS a document may stand that belongs into the first k.

        Any summation order of a float32 dot product errs by at most about dim * 2^-24 * |q| * |x| (Higham, Accuracy
        and Stability of Numerical Algorithms, section 3.1), and two scores are compared.
        """
        return 2.1 * self.dim * 2.0**-24 * self._max_norm * float(np.linalg.norm(query.astype(np.float64)))


def check_queries(queries: Floats, dim: int, origin: str) -> Floats:
    """Returns queries as FAISS takes them; ModelError where they are not finite, or not of the index's dimension."""
    if queries.ndim != 2 or queries.shape[1] != dim:
        shape = " x ".join(map(str, queries.shape))
        raise ModelError(f"the index holds vectors of dimension {dim}, the queries are {shape}: {origin}")
    if not np.isfinite(queries).all():
        raise ModelError("the query vectors hold values that are not finite")
    return np.ascontiguousarray(queries, np.float32)


def exact_scores(vectors: Array, query: Floats, positions: Positions) -> Floats:
    """Returns inner products, in float64 and rounded to float32: `query` [dim] with `positions` [n], or a batch.

    A batch is `query` [b, 1, dim] and `positions` [b, n]. Summed along each row: unlike a matrix product, this gives
    equal rows equal sums wherever they stand.
    """
    products = vectors[positions].astype(np.float64) * query.astype(np.float64)
    return np.asarray(products.sum(axis=-1), np.float32)


def selector(allowed: Allowed) -> Any:
    """Returns what makes FAISS pass over all other documents; what it is given to keeps it, and the bits with it."""
    import faiss

    faiss_any: Any = faiss  # its stubs know the C++ signatures only
    return faiss_any.IDSelectorBitmap(allowed.bits)


def _only(allowed: Allowed | None) -> Any:
    import faiss

    faiss_any: Any = faiss
    return None if allowed is None else faiss_any.SearchParameters(sel=selector(allowed))


def write_flat(
    folder: Path, shards: Iterable[Any], count: int, dim: int
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the FAISS file from shards (float arrays [rows, dim]); returns its record and the settings.

    Vectors are streamed from the shards to the file, never all in memory: FAISS itself would need twice the size of
    the index. The header is FAISS' own, with the number of vectors filled in.
    """
    largest = 0.0

    def chunks() -> Iterator[bytes]:
        nonlocal largest
        yield _header(count, dim)
        for shard in shards:
            block = np.ascontiguousarray(shard, np.dtype("<f4"))
            if not np.isfinite(block).all():
                raise StorageError(folder, "the vectors hold values that are not finite; encode the corpus again")
            if len(block):
                largest = max(largest, float(np.linalg.norm(block.astype(np.float64), axis=1).max()))
            yield block.tobytes()

    record = write_atomic(folder / FILE, chunks(), _HEADER + 4 * count * dim)
    return {FILE: record}, {"dim": dim, "max_norm": largest, "header": _header_digest(folder / FILE)}


def _header(count: int, dim: int) -> bytes:
    import faiss

    def fill(header: bytes, rows: int) -> bytes:
        filled = bytearray(header)
        filled[_COUNT_AT : _COUNT_AT + 8] = rows.to_bytes(8, "little")
        filled[_SIZE_AT : _SIZE_AT + 8] = (rows * dim).to_bytes(8, "little")
        return bytes(filled)

    index = faiss.IndexFlatIP(dim)
    empty = faiss.serialize_index(index).tobytes()
    index.add(np.zeros((3, dim), np.float32))
    # FAISS has kept this layout since 2018; another one must not go unnoticed.
    assert fill(empty, 3) + bytes(3 * dim * 4) == faiss.serialize_index(index).tobytes(), "unknown FAISS file layout"
    return fill(empty, count)


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(_HEADER)).hexdigest()


def _view(index: Any) -> Floats:
    """Returns the vectors of an open index, float32 [n, dim], which it must outlive.

    They are FAISS' own mapping of the file: a second one would take the same memory twice.
    """
    import faiss

    vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    vectors.flags.writeable = False
    return np.asarray(vectors, np.float32)


def _open(path: Path, manifest: Manifest) -> Any:
    import faiss

    # FAISS trusts its header: a changed byte there can make it read outside the file, which kills the process.
    if _header_digest(path) != manifest.settings["header"]:
        raise StorageError(path, "is damaged: its header is not the one that was written; rebuild the index")
    try:
        index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise StorageError(path, f"FAISS cannot read it: {error}") from error
    if index.ntotal != manifest.count or index.d != manifest.settings["dim"]:
        raise StorageError(path, "does not fit its manifest; rebuild the index")
    return index
