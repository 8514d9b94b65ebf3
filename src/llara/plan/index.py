"""What `index` would take: an index of a sample, written as the whole would be, and the whole in its proportion."""

import math
import time
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llara.config import IndexConfig, ModelConfig
from llara.encoding.arrays import Array
from llara.encoding.shards import Vectors
from llara.index.base import write_ids
from llara.index.bm25 import WORDS, check_language, write_bm25
from llara.index.build import documents_per_part, kept_dtype
from llara.index.flat import write_flat
from llara.index.parts import cut_shards
from llara.index.shape import TYPES as APPROXIMATE
from llara.index.shape import Shape
from llara.index.sparse import POSTINGS, cut, write_sparse
from llara.invocation import shell_line
from llara.plan import approximate
from llara.plan.config import PlanIndexConfig, command_line
from llara.plan.corpus import SEED, Sampled, draw_sample, good_documents, store, survey
from llara.plan.measure import (
    device_memory,
    extend,
    folder_bytes,
    forget_peak,
    free_disk,
    held_memory,
    peak_memory,
    scratch,
)
from llara.plan.report import NOTHING, Estimate
from llara.progress import hushed
from llara.records import Document
from llara.templates import MEAN
from llara.terms import Terms

OF_VECTORS = ("flat", *APPROXIMATE)
SHARD = 10_000  # vectors written at once; what `encode` makes where nothing else is said
IDS = 200_000  # are written to see how long all take
HEAPS = 0.5  # a corpus n times larger has about n to this power times the words (Heaps' law, 0.4 to 0.6 in English)
OPENING = 0.05  # seconds of small files beside it, and of reading the finished index back


class _Input(NamedTuple):
    """What is indexed: how many documents, a sample of them, and rows that no store holds yet.

    vectors: How many there are, more than documents where long ones were cut. dim: Size of one. read_seconds: Of all
    rows. remarks: How the documents were counted.
    """

    total: int
    documents: list[Document]
    rows: tuple[Sampled, ...]
    vectors: int
    dim: int
    read_seconds: float
    remarks: tuple[str, ...]

    @property
    def scale(self) -> float:
        """How many times more documents there are than in the sample."""
        return self.total / len(self.documents)


class _Found(NamedTuple):
    """Seconds and bytes by what they go into.

    memory: The most bytes beside those of the process. passing: Bytes on disk that are gone when the job is done.
    searching: What a search holds beside files that are mapped. parts: How many the index is cut into.
    """

    seconds: dict[str, float]
    disk: dict[str, int]
    memory: int
    passing: int = 0
    searching: int | None = None
    parts: int = 1


def estimate(config: PlanIndexConfig, started: float) -> Estimate:
    """Returns the plan; `started` is how many seconds the start of the process took. See `jobs.plan_index`."""
    began = time.perf_counter()
    _import_libraries(config)
    vectors = Vectors.open(config.vectors, config.verify) if config.vectors else None
    if vectors is not None and config.type == "sparse":
        vectors.sparse_settings()
    opening, base = started + OPENING + time.perf_counter() - began, held_memory()
    given = _of_vectors(config, vectors) if vectors else _of_corpus(config)
    with scratch(config.output) as folder:
        if vectors is not None and config.type == "sparse":
            found = _sparse(folder, given, vectors)
        else:
            found = _of_type(config, folder, given, vectors)
    run = bool(config.calibrate)
    follows = config.vectors is not None or config.type == "bm25"
    return Estimate(
        job=f"index ({config.type})",
        corpus=str(config.vectors) if config.vectors else ", ".join(map(str, config.corpus)),
        amounts=_amounts(config, given, found),
        hardware="CPU and disk" if run else NOTHING,
        seconds={"start": opening, **found.seconds} if run else None,
        memory=base + found.memory if run else None,
        memory_here=device_memory(),
        memory_search=found.searching,
        disk={**found.disk, **({"vectors, while a part is built": found.passing} if found.passing else {})},
        disk_after=sum(found.disk.values()),
        disk_free=free_disk(config.output),
        notes=_notes(config, given),
        # Without vectors there is a step before, which may be planned as well.
        next_command=command_line("index", IndexConfig, config)
        if follows
        else shell_line(["plan", "encode", "--model", config.model, "--corpus", *config.corpus]),
    )


def _amounts(config: PlanIndexConfig, given: _Input, found: _Found) -> dict[str, float]:
    amounts: dict[str, float] = {"documents": given.total}
    if config.type in OF_VECTORS:
        amounts["vector size"] = given.dim
    if given.vectors > given.total:
        amounts["vectors"] = given.vectors
    if found.parts > 1:
        amounts["parts"] = found.parts
    return amounts


def _import_libraries(config: PlanIndexConfig) -> None:
    """Imports what the index is made with, so that it counts as the start of the job and not as part of its work."""
    if config.type in OF_VECTORS:
        import faiss  # noqa: F401
    elif config.type == "sparse":
        import scipy.sparse  # noqa: F401
    else:
        import bm25s  # noqa: F401

        check_language(config.language)


def _of_vectors(config: PlanIndexConfig, vectors: Vectors) -> _Input:
    positions = draw_sample(range(len(vectors)), config.sample, SEED)
    documents = [vectors.documents.get(position) for position in positions]
    return _Input(len(vectors), documents, (), vectors.count_rows(), vectors.dim, 0.0, ())


def _of_corpus(config: PlanIndexConfig) -> _Input:
    found = survey(config.corpus, config.sample, SEED)
    documents = good_documents(found.sample)
    count, dim = round(found.rows * len(documents) / len(found.sample)), 0
    if config.type in OF_VECTORS:
        model = ModelConfig(
            model=config.model, offline=config.offline, trust_remote_code=config.trust_remote_code, device="cpu"
        )
        from llara.loading import load_model  # brings torch, which an index of vectors does without

        with hushed():
            dim = load_model(model, for_training=True, weights=False, usual=MEAN).dim  # any template will do
    how = f"documents were {'counted' if found.counted else 'estimated'}"
    return _Input(count, documents, found.sample, count, dim, found.read_seconds, (how, *found.remarks))


def _of_type(config: PlanIndexConfig, folder: Path, given: _Input, vectors: Vectors | None) -> _Found:
    if config.type in APPROXIMATE:
        return _approximate(config, folder, given, vectors)
    return _flat(folder, given) if config.type == "flat" else _bm25(config, folder, given)


def _approximate(config: PlanIndexConfig, folder: Path, given: _Input, vectors: Vectors | None) -> _Found:
    """Tries the work on vectors of the first shard, or on random ones, and counts it for each part that will be cut."""
    parts = Counter(_parts(config, given, vectors))
    shapes = {rows: Shape.of(config, rows, given.dim) for rows in parts}
    largest = max(parts)
    dtype = kept_dtype(vectors) if vectors is not None else "float32"
    base = held_memory()
    forget_peak()
    block = _block(given, vectors, min(SHARD, largest))
    speeds, metric = approximate.measure(folder, block, dtype, shapes[largest], largest)
    tried = peak_memory() - base  # for few vectors most of it is what matrix products take however many there are
    seconds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    searching = 0
    for rows, times in parts.items():
        shape = shapes[rows]
        for name, value in approximate.part_seconds(shape, rows, dtype, speeds).items():
            seconds[name] += times * value  # type: ignore[assignment]  # seconds are no whole numbers
        sizes["index"] += times * approximate.file_bytes(shape, rows)
        sizes["vectors"] += times * approximate.vector_bytes(shape, rows, dtype) if shape.has_lists else 0
        searching += times * approximate.search_memory(shape, rows, metric)
    spent, names = _ids(folder, given)
    sizes["places of passages"] = 24 * given.vectors if given.vectors > given.total else 0
    return _Found(
        {**seconds, "ids": spent},
        {**{name: size for name, size in sizes.items() if size}, "ids": names},
        max(tried, *(approximate.build_memory(shapes[rows], rows) for rows in parts)),
        # A graph holds the vectors itself; while it is built, they lie beside it.
        0 if config.type != "hnsw" else approximate.vector_bytes(shapes[largest], largest, dtype),
        searching,
        sum(parts.values()),
    )


def _parts(config: PlanIndexConfig, given: _Input, vectors: Vectors | None) -> list[int]:
    """Returns how many vectors each part will hold, as `llara.index.build.cut` cuts them."""
    size = documents_per_part(config, given.total, given.vectors, given.dim)
    if vectors is not None:
        return [part.count_rows() for part in cut_shards(vectors, size)]
    size = max(1, size // SHARD) * SHARD
    return [min(size, given.vectors - start) for start in range(0, given.vectors, size)]


def _block(given: _Input, vectors: Vectors | None, count: int) -> Array:
    if vectors is not None:
        first = next((shard for shard in vectors.shards() if len(shard)), None)
        if first is not None:
            return first[:count]
    return np.random.default_rng(SEED).standard_normal((count, given.dim), dtype=np.float32)


def _flat(folder: Path, given: _Input) -> _Found:
    """Writes one shard's worth of vectors, and ids."""
    base = held_memory()
    forget_peak()
    block = np.random.default_rng(SEED).standard_normal((min(SHARD, given.vectors), given.dim), dtype=np.float32)
    began = time.perf_counter()
    write_flat(folder, [block], len(block), given.dim)
    writing = (time.perf_counter() - began) * given.vectors / len(block)
    ids, names = _ids(folder, given)
    disk = {"vectors": 4 * given.dim * given.vectors, "ids": names}
    if given.vectors > given.total:
        disk["places of passages"] = 24 * given.vectors
    return _Found({"write": writing, "ids": ids}, disk, max(peak_memory() - base, 0))


def _sparse(folder: Path, given: _Input, vectors: Vectors) -> _Found:
    """Inverts the first shard that has terms, or as much of it as a segment holds."""
    base = held_memory()
    forget_peak()
    vocabulary, postings = vectors.sparse_settings()["vocabulary"], vectors.count_terms()
    some = next((terms for terms in vectors.terms() if len(terms.ids)), Terms.of_rows([]))
    some = next(iter(cut([some], POSTINGS)), [some])[0]
    began = time.perf_counter()
    write_sparse(folder, lambda: [some], vocabulary)
    scale = postings / len(some.ids)
    writing = (time.perf_counter() - began) * scale
    segments = math.ceil(postings / POSTINGS)
    ids, names = _ids(folder, given)
    disk = {"postings": 8 * postings, "starts": 8 * (vocabulary + 1) * segments, "ids": names}
    memory = max(peak_memory() - base, 0) * min(scale, POSTINGS / len(some.ids))
    return _Found({"write": writing, "ids": ids}, disk, round(memory))


def _ids(folder: Path, given: _Input) -> tuple[float, int]:
    """Returns the seconds and bytes that all ids take; those of the sample are written over and over."""
    some = islice(cycle(document.id for document in given.documents), min(given.total, IDS))
    began = time.perf_counter()
    files = write_ids(folder, some)
    scale = given.total / min(given.total, IDS)
    return (time.perf_counter() - began) * scale, round(sum(record.bytes for record in files.values()) * scale)


def _bm25(config: PlanIndexConfig, folder: Path, given: _Input) -> _Found:
    """Indexes a quarter of the sample, then all of it: what it takes grows along the line through both."""
    small, whole = max(len(given.documents) // 4, 1), len(given.documents)
    base, seconds, memory = held_memory(), [], []
    for count in (small, whole):
        forget_peak()
        began = time.perf_counter()
        write_bm25(folder, given.documents[:count], config.k1, config.b, config.language)
        seconds.append(time.perf_counter() - began)
        memory.append(peak_memory() - base)
    words = (folder / WORDS).stat().st_size
    disk = {
        "postings": round((folder_bytes(folder) - words) * given.scale),
        "words": round(words * given.scale**HEAPS),
    }
    parts = {"words": extend(small, seconds[0], whole, seconds[1], given.total)}
    parts["ids"], disk["ids"] = _ids(folder, given)
    if given.rows:
        stored = store(folder / "documents", given.rows)
        total = round(given.total * len(given.rows) / len(given.documents))
        parts["store"] = given.read_seconds + stored.seconds(total, math.ceil(total / SHARD))
        disk["documents"] = round(stored.bytes_per_row * total)
    return _Found(parts, disk, round(extend(small, memory[0], whole, memory[1], given.total)))


def _notes(config: PlanIndexConfig, given: _Input) -> tuple[str, ...]:
    notes = list(given.remarks)
    if config.type == "flat":
        notes.append("time: one shard of random vectors was written here; reading the vectors back is not in it")
        if config.vectors is None:
            notes.append("the vectors are not made yet: llara plan encode says what they take")
    elif config.type in APPROXIMATE:
        whose = "random vectors" if config.vectors is None else "vectors of the first shard"
        notes.append(f"time: each kind of work was tried on {whose}, and counts for each part by how it grows")
        if config.vectors is None:
            notes.append("the vectors are not made yet: llara plan encode says what they take")
    elif config.type == "sparse":
        notes.append("time: the first shard was indexed here, and counts for the others in proportion")
    else:
        notes.append(f"time and memory: {len(given.documents):,} documents were indexed, and the line extended")
    return tuple(notes)
