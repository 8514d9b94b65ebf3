"""What `encode` would take: passages of a sample encoded and stored as they would be, and the whole in proportion."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from llara.batching import budget_batches
from llara.config import EncodeConfig
from llara.encoding.arrays import npy_bytes
from llara.encoding.encoder import DocumentEncoder, open_cutter
from llara.encoding.engine import AHEAD
from llara.hardware import keep_freed_memory, parse_fleet
from llara.loading import device_of, load_model, pick_dtype
from llara.model import TOKEN_BUDGET, EmbeddingModel
from llara.plan.config import GPU_BUDGET, PlanEncodeConfig, command_line
from llara.plan.corpus import SEED, Stored, Survey, good_documents, store, survey
from llara.plan.measure import (
    device_memory,
    device_name,
    forget_peak,
    free_disk,
    held_memory,
    make_twice,
    peak_memory,
    scratch,
)
from llara.plan.report import NOTHING, Estimate, FleetEstimate, duration, size
from llara.progress import hushed, note
from llara.records import Document
from llara.retriever import Retriever

FIRST_PASSAGES = 8  # encoded first, to see how many there is time for
TABLE_BYTES = 60  # per document, of the table that finds repeated ids; gone when the job is done


class _Work(NamedTuple):
    """What there is to encode: the documents of the sample that are none of its bad rows, and their token rows.

    Where long documents are cut, `documents` are the passages of these `good` ones.
    """

    found: Survey
    good: int
    documents: list[Document]
    lengths: list[int]
    budget: int
    shard_size: int

    @property
    def rows(self) -> int:
        """Documents in all, bad rows left out; or passages."""
        return round(self.found.rows * len(self.documents) / len(self.found.sample))

    @property
    def shards(self) -> int:
        """Shards in all."""
        return math.ceil(self.found.rows / self.shard_size)

    @property
    def cells(self) -> int:
        """Padded tokens of the sample."""
        return padded(self.lengths, self.budget)

    def amounts(self) -> dict[str, float]:
        """Returns the figures to show."""
        tokens = sum(self.lengths)
        return {
            "documents": self.found.rows,
            **({"passages": self.rows} if len(self.documents) > self.good else {}),
            "bytes of text": self.found.bytes,
            "tokens": round(tokens * self.rows / len(self.documents)),
            "tokens per passage": tokens / len(self.documents),
            "padding": 1 - tokens / self.cells,
            "shards": self.shards,
        }


class _Speed(NamedTuple):
    """What encoding takes: seconds per padded token, over so many passages, and the most memory held meanwhile.

    `terms` are those of a passage in its sparse vector, on average; 0 where none are asked for.
    """

    per_cell: float
    passages: int
    memory: int
    terms: float


def estimate(config: PlanEncodeConfig, started: float) -> Estimate:
    """Returns the plan; `started` is how many seconds the start of the process took. See `jobs.plan_encode`."""
    found = survey(config.corpus, config.sample, SEED)
    texts = good_documents(found.sample)
    with hushed():
        outline, first = make_twice(lambda: load_model(config, weights=False))
    reason = _why_not_run(config, outline)
    forget_peak(device_of(config))
    began = time.perf_counter()
    model = outline if reason else load_model(config)
    assert reason or model.fingerprint  # reads the weights of a base model once more, as the job does
    started += first + time.perf_counter() - began
    length = config.passage_length or model.contract.passage_length
    model.check_length(length, "a passage length")
    before = held_memory(model.device)
    good, texts = len(texts), _passages(config, model, texts, length)
    work = _Work(found, good, texts, _lengths(model, texts, length), _budget(config, model), config.shard_size)
    per_passage = max(peak_memory(model.device) - before, 0) / len(texts)
    with scratch(config.output) as folder:
        stored = store(folder, found.sample)
    seconds = memory = speed = None
    if not reason:
        note(f"calibrating: about {config.calibrate:g} s of encoding passages of the corpus")
        held = held_memory(model.device)
        speed = _encode_a_little(config, model, work)
        seconds = _seconds(work, stored, speed, started)
        forward = speed.memory - held
        held_at_once = round(min(AHEAD * config.shard_size, found.rows) * len(texts) / good)
        memory = _workers(config, model) * _at_most(before + forward, per_passage, held_at_once, model)
    disk = {
        "vectors": npy_bytes(np.dtype(config.vector_dtype), (work.rows, model.dim)),
        "documents and ids": round(stored.bytes_per_row * found.rows),
        "table of ids": TABLE_BYTES * round(found.rows * good / len(found.sample)),
    }
    if config.vector_dtype == "int8":
        disk["vectors"] += npy_bytes(np.dtype(np.float32), (work.rows,))
    if config.long == "cut":
        disk["places of passages"] = npy_bytes(np.dtype(np.int64), (work.rows, 3))
    if config.sparse:
        disk["sparse vectors"] = round((8 + 8 * (speed.terms if speed else config.sparse_top_k)) * work.rows)
    return Estimate(
        job="encode",
        corpus=", ".join(map(str, config.corpus)),
        amounts=work.amounts(),
        hardware=NOTHING if reason else device_name(model.device, next(model.lm.parameters()).dtype),
        seconds=seconds,
        memory=memory,
        memory_here=device_memory(model.device),
        disk=disk,
        disk_after=sum(disk.values()) - disk["table of ids"],
        disk_free=free_disk(config.output),
        fleet=_fleet(config, outline, work) if config.fleet else None,
        notes=(*_notes(work, speed, reason, config.sparse), *_worker_notes(config, work, stored)),
        next_command=command_line("encode", EncodeConfig, config),
    )


def padded(lengths: Sequence[int], budget: int) -> int:
    """Returns the padded tokens of rows that are cut into batches by a token budget."""
    sizes = np.asarray(lengths)
    return sum(len(batch) * int(sizes[batch].max()) for batch in budget_batches(sizes, budget))


def _budget(config: PlanEncodeConfig, model: EmbeddingModel) -> int:
    return config.token_budget or TOKEN_BUDGET.get(model.device.type, GPU_BUDGET)


def _why_not_run(config: PlanEncodeConfig, outline: EmbeddingModel) -> str:
    """Returns why nothing can be encoded here, or nothing."""
    if not config.calibrate:
        return "nothing was run (--calibrate 0), so neither time nor memory here is known"
    device = device_of(config)
    count = sum(weight.numel() for weight in outline.lm.parameters())
    needed, here = count * pick_dtype(config.dtype, device).itemsize, device_memory(device)
    if here is not None and needed > here:
        return f"nothing was run: the weights alone need {size(needed)} of memory, and {size(here)} are here"
    return ""


def _passages(
    config: PlanEncodeConfig, model: EmbeddingModel, documents: list[Document], length: int
) -> list[Document]:
    """Returns what is encoded: the documents, or their passages as documents."""
    if config.long != "cut":
        return documents
    cut = open_cutter(Retriever(model), length, config.overlap).cut(documents)
    return [Document("", text, title) for text, title in zip(cut.texts, cut.titles, strict=True)]


def _lengths(model: EmbeddingModel, texts: Sequence[Document], length: int) -> list[int]:
    """Returns the tokens of each text's row, all of them tokenised at once, as those of a shard are."""
    join = model.contract.join_title
    rows = model.bind().encode([join(text.title, text.text) for text in texts], "passage", length)
    return [len(row) for row in rows]


def _encode_a_little(config: PlanEncodeConfig, model: EmbeddingModel, work: _Work) -> _Speed:
    """Encodes a few passages, then as many as there is time for; a random part of the sample, in one call."""
    encoded = DocumentEncoder(Retriever(model), replace(config, long="truncate", overlap=0))  # all of these fit
    terms = 0.0

    def encode(numbers: Sequence[int]) -> float:
        nonlocal terms
        began = time.perf_counter()
        found = encoded([work.documents[number] for number in numbers])
        if isinstance(found, tuple) and found[1] is not None:
            terms = len(found[1].ids) / len(numbers)
        return time.perf_counter() - began

    order = random.Random(SEED).sample(range(len(work.documents)), len(work.documents))
    some = order[:FIRST_PASSAGES]
    with keep_freed_memory():  # as the job does
        encode(some[:1])  # what is set up once is no part of the speed
        taken = encode(some)
        count = int(len(some) * config.calibrate / max(taken, 1e-9))
        if count > len(some):
            some = order[:count]
            taken = encode(some)
        memory = peak_memory(model.device)
    cells = padded([work.lengths[number] for number in some], work.budget)
    return _Speed(taken / cells, len(some), memory, terms)


def _seconds(work: _Work, stored: Stored, speed: _Speed, started: float) -> dict[str, float]:
    return {
        "start": started,
        "read": 2 * work.found.read_seconds,  # rows are counted first
        "encode": speed.per_cell * work.cells * work.rows / len(work.documents),
        "store": stored.seconds(work.found.rows, work.shards),
    }


def _at_most(base: int, per_passage: float, passages: int, model: EmbeddingModel) -> int:
    """Returns the most that a process holds: passages of one shard are tokenised while another's are encoded."""
    vectors = 2 * 4 * model.dim * passages if model.device.type == "cuda" else 0
    return round(base + per_passage * passages + vectors)


def _fleet(config: PlanEncodeConfig, outline: EmbeddingModel, work: _Work) -> FleetEstimate:
    # Imported after all measurements: it brings along what training needs, and encoding does without.
    from llara.plan.fleet import Load, estimate_encoding

    assert config.fleet is not None
    fleet, budget = parse_fleet(config.fleet), config.token_budget or GPU_BUDGET
    per_passage = padded(work.lengths, budget) / len(work.lengths)
    slots = len(outline.contract.template.passage.slots) if config.sparse else 0
    load = Load(per_passage * work.rows / fleet.number, cells_per_pass=budget, width=round(per_passage), slots=slots)
    return estimate_encoding(config, outline, fleet, load)


def _notes(work: _Work, speed: _Speed | None, reason: str, sparse: bool) -> tuple[str, ...]:
    sampled = len(work.found.sample)
    notes = [work.found.counting("tokens"), *work.found.remarks]
    if work.good < sampled:
        notes.append(f"{sampled - work.good:,} of {sampled:,} rows are bad and would be left out")
    if speed is None:
        return (*notes, reason, *(["sparse vectors: at most; fewer terms take less"] if sparse else []))
    return (
        *notes,
        f"time: {speed.passages:,} passages of the sample were encoded, and the whole sample stored",
        "memory: the process with its model, and what the passages of two shards take beside it",
    )


def _workers(config: PlanEncodeConfig, model: EmbeddingModel) -> int:
    """Returns how many processes share this machine's memory; each GPU has its own."""
    return (config.workers or 1) if config.engine == "local" and model.device.type == "cpu" else 1


def _worker_notes(config: PlanEncodeConfig, work: _Work, stored: Stored) -> list[str]:
    notes = []
    if config.engine == "local" and (config.workers or 1) > 1:
        told = "time is that of one process on all cores, or on one GPU; memory on a CPU is that of all"
        notes.append(f"{config.workers} workers: {told}")
    if config.engine == "ray":
        notes.append("time and memory here are those of one process on this machine, and not of the cluster")
    if config.engine == "ray" or config.fleet or (config.workers or 1) > 1:
        alone = 2 * work.found.read_seconds + stored.seconds(work.found.rows, work.shards)
        notes.append(f"reading and storing is one process's work, however many encode: about {duration(alone)}")
    return notes
