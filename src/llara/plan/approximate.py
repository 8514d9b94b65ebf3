"""What one part of an approximate index takes: each kind of its work tried on a few vectors, and its files counted.

The kinds grow differently, so each is measured by itself. Lists are learned from a sample, whose vectors are compared
with all lists in each round of k-means; codes from a sample of their own; and adding compares every vector with all
lists of the part. A rotation is the same work for a vector whatever the lists; that of a graph grows by the logarithm
of what is in it.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llara.encoding.arrays import Array, npy_bytes
from llara.index.faiss import inner
from llara.index.shape import ROUNDS, TRAIN, Shape, add_step, metric_number, write_vectors
from llara.plan.measure import Clock

TRIED = 4096  # vectors that the work is tried on
COMPARED = 1024  # of them that are compared with as many lists as a part has
PER_CENTRE = 256  # vectors that FAISS lets a centroid learn from, at most
BLOCK = 32  # codes that lie together where FAISS compares so many at once: the last ones of a list fill a whole block


class Speeds(NamedTuple):
    """Seconds that each kind of work takes; per vector, but for `draw` and `byte`."""

    byte: float
    """Of vectors and index on their way to the disk."""
    draw: float
    """Of making the empty index, which draws the rotation."""
    rotate: float
    compare: float
    """With one list."""
    centre: float
    """In a round of k-means, beside comparing."""
    learn: float
    """Of the sample for codes, beside comparing."""
    add: float
    """Beside rotating and comparing; to a graph of one vector."""
    growth: float
    """Of a graph: how much more for each unit of the logarithm of its size."""


def measure(folder: Path, block: Array, dtype: str, shape: Shape) -> tuple[Speeds, str]:
    """Tries the work on some vectors [n, dim]; returns the speeds, and the metric as in `write_vectors`.

    `shape` is that of a whole part, `dtype` that of its vectors on disk.
    """
    clock = Clock()
    with clock.part("write"):
        written = write_vectors(folder, [block], len(block), dtype, shape)
    byte = clock.seconds["write"] / written.record.bytes
    if not shape.has_lists:
        return _measure_graph(byte, np.ascontiguousarray(block, np.float32), shape, written.metric), written.metric
    tried = np.ascontiguousarray(block[:TRIED], np.float32)
    return _measure_lists(byte, tried, shape, written.metric, clock), written.metric


def _measure_graph(byte: float, tried: Array, shape: Shape, metric: str) -> Speeds:
    """Builds a graph of a quarter, and one of all: what a vector takes grows along the line through both."""
    clock, counts = Clock(), (max(len(tried) // 4, 1), len(tried))
    for name, count in zip(("quarter", "all"), counts, strict=True):
        graph = shape.make(metric)
        with clock.part(name):
            graph.add(tried[:count])
    small, whole = clock.seconds["quarter"] / counts[0], clock.seconds["all"] / counts[1]
    logs = [math.log(count) for count in counts]
    growth = max(whole - small, 0.0) / (logs[1] - logs[0]) if counts[0] < counts[1] else 0.0
    return Speeds(byte, 0, 0, 0, 0, 0, whole - growth * logs[1], growth)


def _measure_lists(byte: float, tried: Array, shape: Shape, metric: str, clock: Clock) -> Speeds:
    import faiss

    faiss_any: Any = faiss
    kind, nlist = metric_number(metric), int(shape.settings["nlist"])
    least = 1 << int(shape.settings.get("pq_bits", 0))  # which learn that many codes; repeated where there are fewer
    tried = tried[np.arange(max(len(tried), least)) % len(tried)]
    count, few = len(tried), max(1, len(tried) // TRAIN)
    with clock.part("draw"):
        index = replace(shape, settings={**shape.settings, "nlist": few}).make(metric)
    lists, rotation = inner(index)
    if rotation is not None:
        with clock.part("rotate"):
            tried = rotation.apply(tried)
    with clock.part("centres"):
        lists.train_q1(count, faiss_any.swig_ptr(tried), False, kind)
    with clock.part("compare with few"):
        lists.quantizer.search(tried, 1)
    with clock.part("learn"):
        lists.train(tried)
    with clock.part("add"):
        lists.add(tried)
    centres = faiss_any.IndexFlat(shape.dim, kind)
    centres.add(np.resize(tried, (nlist, shape.dim)))
    with clock.part("compare"):
        centres.search(tried[:COMPARED], 1)
    seconds = clock.seconds
    compared = seconds["compare with few"]
    return Speeds(
        byte=byte,
        draw=seconds["draw"],
        rotate=seconds.get("rotate", 0.0) / count,
        compare=seconds["compare"] / (min(count, COMPARED) * nlist),
        centre=max(seconds["centres"] / ROUNDS - compared, 0.0) / count,
        learn=max(seconds["learn"] - compared, 0.0) / count,
        add=max(seconds["add"] - compared, 0.0) / count,
        growth=0,
    )


def part_seconds(shape: Shape, rows: int, dtype: str, speeds: Speeds) -> dict[str, float]:
    """Returns how long one part of `rows` vectors takes, by kind of work."""
    moved = vector_bytes(shape, rows, dtype) + file_bytes(shape, rows)
    write = {"write": moved * speeds.byte}
    if not shape.has_lists:
        return {"add": rows * (speeds.add + speeds.growth * math.log(rows)), **write}
    nlist, sampled, learned = int(shape.settings["nlist"]), shape.sample(rows), _learned(shape, rows)
    compare = speeds.compare * nlist
    rounds = ROUNDS * min(sampled, PER_CENTRE * nlist) * (speeds.centre + compare)
    train = speeds.draw + sampled * speeds.rotate + rounds + learned * (speeds.learn + compare)
    return {"train": train, "add": rows * (speeds.rotate + compare + speeds.add), **write}


def vector_bytes(shape: Shape, rows: int, dtype: str) -> int:
    """Returns the size of the vectors' file; that of a graph is there while it is built, and in float32."""
    return npy_bytes(np.dtype(dtype if shape.has_lists else "float32"), (rows, shape.dim))


def file_bytes(shape: Shape, rows: int) -> int:
    """Returns the size of what FAISS writes of `rows` vectors.

    Exact but for the levels that a graph draws, and for what the ends of several lists leave unfilled of their blocks.
    """
    import faiss

    faiss_any: Any = faiss
    index = shape.unrotated("l2")
    if not shape.has_lists:
        # Each vector, its level and where its links begin; the links of all its levels, 4 bytes each.
        shares = enumerate(faiss_any.vector_to_array(index.hnsw.assign_probas).tolist(), 1)
        links = sum(share * index.hnsw.cum_nb_neighbors(level) for level, share in shares)
        return int(len(faiss_any.serialize_index(index)) + round(rows * (4 * shape.dim + 4 + 8 + 4 * links)))
    nlist = int(shape.settings["nlist"])
    index.quantizer.add(np.zeros((nlist, shape.dim), np.float32))
    empty = len(faiss_any.serialize_index(index)) + (4 * shape.dim**2 if shape.type == "rabitq" else 0)
    lists = faiss_any.downcast_InvertedLists(index.invlists)
    if not shape.holds_codes:
        return int(empty + rows * (8 + lists.code_size) + 8 * nlist)
    blocks = math.ceil(rows / BLOCK) if nlist == 1 else rows / BLOCK + nlist * (BLOCK - 1) / (2 * BLOCK)
    return int(empty + 8 * rows + blocks * lists.block_size)


def build_memory(shape: Shape, rows: int) -> int:
    """Returns about how many bytes the building of a part holds."""
    if not shape.has_lists:
        return rows * shape.bytes_per_vector
    copies = 2 if shape.type == "rabitq" else 1  # as they were, and rotated
    sampled, learned = shape.sample(rows), _learned(shape, rows)
    train = 4 * shape.dim * (copies * sampled + learned * (1 if learned == sampled else 2))
    add = rows * shape.bytes_per_vector + 4 * shape.dim * copies * min(rows, add_step(shape.dim))
    fixed = 4 * shape.dim * (int(shape.settings["nlist"]) + (shape.dim if shape.type == "rabitq" else 0))
    return fixed + max(train, add)


def search_memory(shape: Shape, rows: int, metric: str) -> int:
    """Returns how many bytes an open part holds for itself, beside files that are mapped; see `llara.index.faiss`."""
    import faiss

    faiss_any: Any = faiss
    if shape.holds_codes:
        return file_bytes(shape, rows)
    if shape.type == "hnsw" or metric != "l2":
        return 0
    # FAISS computes the products of centroids and codes beforehand, where they take no more than this.
    table = 4 * int(shape.settings["nlist"]) * int(shape.settings["pq_m"]) << int(shape.settings["pq_bits"])
    return table if table <= faiss_any.cvar.precomputed_table_max_bytes else 0


def _learned(shape: Shape, rows: int) -> int:
    """Returns how many vectors codes are learned from; FAISS takes no more for the codebooks of PQ."""
    sampled = shape.sample(rows)
    return min(sampled, PER_CENTRE << int(shape.settings["pq_bits"])) if shape.type == "ivfpq" else sampled
