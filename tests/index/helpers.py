"""Small indexes for tests, made without a vectors folder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llara.config import IndexConfig
from llara.index.base import Index, Manifest, write_ids
from llara.index.bm25 import Bm25Index, write_bm25
from llara.index.faiss import Effort, FaissIndex
from llara.index.flat import FlatIndex, write_flat
from llara.index.milvus import choose_place, write_milvus
from llara.index.opening import open_index
from llara.index.parts import write_deleted
from llara.index.shape import Shape, write_faiss
from llara.index.sparse import SparseIndex, write_sparse
from llara.progress import Progress
from llara.records import Document
from llara.terms import Terms


def manifest(kind: str, count: int, settings: dict[str, Any], files: dict[str, Any]) -> Manifest:
    return Manifest(kind, count, settings, None, "models/somewhere", "fingerprint", "../vectors", files)


def make_flat(folder: Path, vectors: np.ndarray[Any, Any], ids: Sequence[str], shard: int = 7) -> FlatIndex:
    shards = [vectors[start : start + shard] for start in range(0, len(vectors), shard)]
    files, settings = write_flat(folder, shards, *vectors.shape)
    manifest("flat", len(vectors), settings, {**files, **write_ids(folder, ids)}).publish(folder)
    return FlatIndex(folder, Manifest.read(folder))


def make_sparse(
    folder: Path, rows: Sequence[Mapping[int, float]], ids: Sequence[str], vocabulary: int = 60, most: int = 40
) -> SparseIndex:
    terms = as_terms(rows)
    shards = [terms.part(start, min(start + 7, len(rows))) for start in range(0, len(rows), 7)]
    files, settings = write_sparse(folder, lambda: shards, vocabulary, most)
    files |= write_ids(folder, ids)
    identity = {"sparse": {"top_k": 9, "expansion": False, "fold": False, "vocabulary": vocabulary}}
    made = manifest("sparse", len(rows), settings, files)
    replace(made, model=identity).publish(folder)
    return SparseIndex(folder, Manifest.read(folder))


def as_terms(rows: Sequence[Mapping[int, float]]) -> Terms:
    """Sparse vectors in the order of `Terms`, from weights by term."""
    ordered = [sorted(row.items(), key=lambda each: (-each[1], each[0])) for row in rows]
    return Terms.of_rows([(np.array([t for t, _ in row]), np.float32([w for _, w in row])) for row in ordered])


def make_bm25(
    folder: Path, documents: Sequence[Document], k1: float = 0.9, b: float = 0.4, language: str = "english"
) -> Bm25Index:
    files, settings = write_bm25(folder, documents, k1, b, language)
    files |= write_ids(folder, (document.id for document in documents))
    manifest("bm25", len(documents), settings, files).publish(folder)
    return Bm25Index(folder, Manifest.read(folder))


def make_faiss(
    folder: Path,
    vectors: np.ndarray[Any, Any],
    ids: Sequence[str],
    kind: Any,
    effort: Effort | None = None,
    **settings: Any,
) -> FaissIndex:
    count, dim = vectors.shape
    shape = Shape.of(IndexConfig(type=kind, vectors=Path("v"), output=folder, **settings), count, dim)
    shards = [vectors[start : start + 7] for start in range(0, count, 7)]
    files, written = write_faiss(folder, shards, count, str(vectors.dtype), shape)
    manifest(kind, count, written, {**files, **write_ids(folder, ids)}).publish(folder)
    return FaissIndex(folder, Manifest.read(folder), effort)


def make_milvus(folder: Path, vectors: np.ndarray[Any, Any], ids: Sequence[str], kind: str = "FLAT") -> Index[Any]:
    place = choose_place(folder, None, None, kind, "fingerprint")
    files = write_ids(folder, ids)
    with Progress("index", len(ids), "documents") as shown:
        settings = write_milvus(folder, [vectors], place, vectors.shape[1], 0, shown)
    manifest("milvus", len(ids), settings, files).publish(folder)
    return open_index(folder)


def join(folder: Path, parts: Sequence[Index[Any]]) -> Index[Any]:
    """An index folder whose parts, which lie in it, were made already."""
    first = parts[0].manifest
    files: dict[str, Any] = {}
    named = [
        {"folder": f"part-{n:05d}", "count": len(part), "digest": part.manifest.digest} for n, part in enumerate(parts)
    ]
    made = replace(manifest(first.type, 0, {}, files), model=first.model, parts=named)
    made.publish(folder)
    return open_index(folder)


def delete(folder: Path, positions: Sequence[int]) -> Index[Any]:
    """Deletes documents of an index by their positions."""
    made = Manifest.read(folder)
    name, record = write_deleted(folder, made, np.array(sorted(positions), np.int64))
    replace(made, deleted=name, files={**made.files, name: record}).publish(folder)
    return open_index(folder)
