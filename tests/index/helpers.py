"""Small indexes for tests, made without a vectors folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llara.index.base import Manifest, write_ids
from llara.index.bm25 import Bm25Index, write_bm25
from llara.index.flat import FlatIndex, write_flat
from llara.records import Document


def manifest(kind: str, count: int, settings: dict[str, Any], files: dict[str, Any]) -> Manifest:
    return Manifest(kind, count, settings, None, "models/somewhere", "fingerprint", "../vectors", files)


def make_flat(folder: Path, vectors: np.ndarray[Any, Any], ids: Sequence[str], shard: int = 7) -> FlatIndex:
    shards = [vectors[start : start + shard] for start in range(0, len(vectors), shard)]
    files, settings = write_flat(folder, shards, *vectors.shape)
    manifest("flat", len(vectors), settings, {**files, **write_ids(folder, ids)}).publish(folder)
    return FlatIndex(folder, Manifest.read(folder))


def make_bm25(
    folder: Path, documents: Sequence[Document], k1: float = 0.9, b: float = 0.4, language: str = "english"
) -> Bm25Index:
    files, settings = write_bm25(folder, documents, k1, b, language)
    files |= write_ids(folder, (document.id for document in documents))
    manifest("bm25", len(documents), settings, files).publish(folder)
    return Bm25Index(folder, Manifest.read(folder))
