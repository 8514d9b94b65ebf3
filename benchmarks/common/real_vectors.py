"""Vectors of real text by the shipped model, and as many more as are asked for, made from them with noise.

The real ones are passages of 40 words of the data in the folder `shared` (Wikipedia, SciFact, MedQuAD), the queries the
questions of MedQuAD and the claims of SciFact, both encoded by `mini`. A made-up vector is a real one plus noise that
has the covariance of the real ones, scaled so that it lies as far from its origin as a real vector lies, in the median,
from its nearest neighbour among the real ones; then all have length 1. So the made-up ones fill the space that texts
fill, and no other.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llara.config import ModelConfig
from llara.encoding.arrays import write_array, write_chunks_of
from llara.retriever import Retriever

SHARED = Path(os.environ.get("LLARA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
WORDS = 40
DIM = 256
BLOCK = 50_000
Array = np.ndarray[Any, np.dtype[Any]]


def encode_real(folder: Path, passages: int, queries: int) -> tuple[Array, Array]:
    """Returns float32 [passages, 256] and [queries, 256]; both are kept in `folder`, and taken from there next time."""
    paths = folder / f"real-{passages}.npy", folder / f"queries-{queries}.npy"
    if not all(path.exists() for path in paths):
        texts, questions = _texts()
        retriever = Retriever.for_job(ModelConfig(model="mini", device="cpu"))
        write_array(paths[1], retriever.encode_queries(questions[:queries]))
        parts = []
        for start in range(0, passages, 1000):
            parts.append(retriever.encode_passages(texts[start : min(start + 1000, passages)]))
            print(f"{start + len(parts[-1]):,} of {passages:,} passages encoded", flush=True)
        write_array(paths[0], np.concatenate(parts))
    real, asked = (np.load(path) for path in paths)
    return real, asked


def extend(folder: Path, real: Array, count: int, dtype: str, seed: int = 0) -> tuple[Path, float]:
    """Returns a file of `count` vectors, the real ones first, and how long the noise is, as a share of a vector."""
    length = float(np.median(nearest_distances(real[:5000], real)))
    path = folder / f"vectors-{count}-{dtype}.npy"
    if not path.exists():
        write_chunks_of(path, dtype, (count, real.shape[1]), _extended(real, count, length, seed))
    return path, length


def nearest_distances(some: Array, every: Array) -> Array:
    """Returns how far each of some vectors of length 1 is from the nearest other one of all."""
    products = some @ every.T
    products[products > 1 - 1e-6] = -1  # itself, and copies of it
    return np.asarray(np.sqrt(np.maximum(2 - 2 * products.max(axis=1), 0)))


def _extended(real: Array, count: int, length: float, seed: int) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    # The root of the covariance: what it makes of white noise varies as the real vectors do.
    values, directions = np.linalg.eigh(np.cov(real.T))
    root = (directions * np.sqrt(np.maximum(values, 0))).astype(np.float32)
    scale = length / np.sqrt(np.maximum(values, 0).sum())
    yield real[:count]
    for start in range(len(real), count, BLOCK):
        rows = min(BLOCK, count - start)
        noise = rng.standard_normal((rows, real.shape[1]), np.float32) @ root.T
        made = real[rng.integers(0, len(real), rows)] + np.float32(scale) * noise
        yield made / np.linalg.norm(made, axis=1, keepdims=True)


def _texts() -> tuple[list[str], list[str]]:
    """Returns passages and questions, shuffled, each once."""
    passages: dict[str, None] = {}
    questions: dict[str, None] = {}
    for row in _rows(SHARED / "wiki" / "articles.jsonl.gz"):
        passages.update(dict.fromkeys(_cut(row["text"])))
    for row in _rows(SHARED / "scifact" / "corpus.jsonl.gz"):
        passages.update(dict.fromkeys(_cut(row["text"])))
    for row in _rows(SHARED / "medquad" / "pairs.jsonl.gz"):
        passages.update(dict.fromkeys(_cut(row["answer"])))
        questions[row["question"]] = None
    for row in _rows(SHARED / "scifact" / "queries.jsonl"):
        questions[row["text"]] = None
    found = list(passages), list(questions)
    rng = np.random.default_rng(0)
    for each in found:
        rng.shuffle(each)
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            yield json.loads(line)


def _cut(text: str) -> Iterator[str]:
    words = text.split()
    for start in range(0, len(words) - WORDS + 1, WORDS):
        yield " ".join(words[start : start + WORDS])
