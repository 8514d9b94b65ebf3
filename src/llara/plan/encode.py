"""What `encode` would take: passages of a sample encoded and stored as they would be, and the whole in proportion."""

import math
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llara.batching import budget_batches
from llara.config import EncodeConfig
from llara.encoding.arrays import npy_bytes
from llara.hardware import parse_fleet
from llara.loading import load_model, pick_device, pick_dtype
from llara.model import TOKEN_BUDGET, EmbeddingModel
from llara.plan.config import GPU_BUDGET, PlanEncodeConfig, command_line
from llara.plan.corpus import SEED, Survey, good_documents, store_bytes, survey
from llara.plan.measure import (
    Clock,
    device_memory,
    device_name,
    forget_peak,
    free_disk,
    held_memory,
    peak_memory,
    scratch,
)
from llara.plan.report import NOTHING, Estimate, FleetEstimate, size
from llara.progress import hushed, note
from llara.records import Document
from llara.retriever import Retriever

FIRST_PASSAGES = 8  # encoded first, to see how many there is time for
TABLE_BYTES = 60  # per document, of the table that finds repeated ids; gone when the job is done


class _Sample(NamedTuple):
    """The documents of the sample that are none of the bad rows, and the lengths of their token rows."""

    documents: list[Document]
    lengths: list[int]


class _Speed(NamedTuple):
    """What encoding takes: seconds per padded token, over so many passages, and the most memory held meanwhile."""

    per_cell: float
    passages: int
    memory: int


class _Memory(NamedTuple):
    """Bytes held: by the process with its model, on top of that per passage of a shard, and by forward passes."""

    base: int
    per_passage: float
    forward: int


def estimate(config: PlanEncodeConfig, started: float) -> Estimate:
    """Returns the plan; `started` is how many seconds the start of the process took. See `jobs.plan_encode`."""
    found = survey(config.corpus, config.sample, SEED)
    texts = good_documents(found.sample)
    with hushed():
        outline = load_model(config, weights=False)
    reason = _why_not_run(config, outline)
    clock = Clock()
    forget_peak(pick_device(config.device))
    with clock.part("start"):
        model = outline if reason else load_model(config)
        assert reason or model.fingerprint  # reads the weights of a base model once more, as the job does
    length = config.passage_length or model.contract.passage_length
    model.check_length(length, "a passage length")
    before = held_memory(model.device)
    sample = _tokenised(model, texts, length)
    per_passage = max(peak_memory(model.device) - before, 0) / len(texts)
    speed, rows = None, round(found.rows * len(texts) / len(found.sample))
    with scratch(config.output) as folder:
        with clock.part("store"):
            stored = store_bytes(folder / "documents", found.sample)
        if not reason:
            note(f"calibrating: about {config.calibrate:g} s of encoding passages of the corpus")
            held = held_memory(model.device)
            speed = _encode_a_little(config, model, sample, length)
            memory = _Memory(before, per_passage, speed.memory - held)
    cells = padded(sample.lengths, _budget(config, model))
    disk = {
        "vectors": npy_bytes(np.dtype(config.vector_dtype), (rows, model.dim)),
        "documents and ids": round(stored * found.rows / len(found.sample)),
        "table of ids": TABLE_BYTES * rows,
    }
    return Estimate(
        job="encode",
        corpus=", ".join(map(str, config.corpus)),
        amounts={
            "documents": found.rows,
            "bytes of text": found.bytes,
            "tokens": round(sum(sample.lengths) * rows / len(texts)),
            "tokens per passage": sum(sample.lengths) / len(texts),
            "padding": 1 - sum(sample.lengths) / cells,
            "shards": math.ceil(found.rows / config.shard_size),
        },
        hardware=NOTHING if speed is None else device_name(model.device, next(model.lm.parameters()).dtype),
        seconds=None if speed is None else _seconds(found, clock, started, speed, cells * rows / len(texts)),
        memory=None if speed is None else _at_most(memory, min(config.shard_size, found.rows), model),
        memory_here=device_memory(model.device),
        disk=disk,
        disk_after=sum(disk.values()) - disk["table of ids"],
        disk_free=free_disk(config.output),
        fleet=_fleet(config, outline, sample, rows) if config.fleet else None,
        notes=_notes(found, texts, speed, reason),
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
    device = pick_device(config.device)
    count = sum(weight.numel() for weight in outline.lm.parameters())
    needed, here = count * pick_dtype(config.dtype, device).itemsize, device_memory(device)
    if here is not None and needed > here:
        return f"nothing was run: the weights alone need {size(needed)} of memory, and {size(here)} are here"
    return ""


def _tokenised(model: EmbeddingModel, texts: Sequence[Document], length: int) -> _Sample:
    join = model.contract.join_title
    rows = model.bind().encode([join(text.title, text.text) for text in texts], "passage", length)
    return _Sample(list(texts), [len(row) for row in rows])


def _encode_a_little(config: PlanEncodeConfig, model: EmbeddingModel, sample: _Sample, length: int) -> _Speed:
    """Encodes a few passages, then as many as there is time for; a random part of the sample, in one call."""
    order = random.Random(SEED).sample(range(len(sample.documents)), len(sample.documents))
    first = order[:FIRST_PASSAGES]
    _encode(config, model, sample, first[:1], length)  # what is set up once is no part of the speed
    taken = _encode(config, model, sample, first, length)
    count = int(len(first) * config.calibrate / max(taken, 1e-9))
    if count > len(first):
        first = order[:count]
        taken = _encode(config, model, sample, first, length)
    cells = padded([sample.lengths[number] for number in first], _budget(config, model))
    return _Speed(taken / cells, len(first), peak_memory(model.device))


def _encode(
    config: PlanEncodeConfig, model: EmbeddingModel, sample: _Sample, numbers: Sequence[int], length: int
) -> float:
    """Encodes some documents of the sample as a shard is encoded; returns the seconds it took."""
    picked = [sample.documents[number] for number in numbers]
    began = time.perf_counter()
    Retriever(model).encode_passages(
        [document.text for document in picked],
        titles=[document.title for document in picked],
        token_budget=config.token_budget,
        max_length=length,
    )
    return time.perf_counter() - began


def _seconds(found: Survey, clock: Clock, started: float, speed: _Speed, cells: float) -> dict[str, float]:
    return {
        "start": started + clock.seconds["start"],
        "read": 2 * found.read_seconds,  # rows are counted first
        "encode": speed.per_cell * cells,
        "store": clock.seconds["store"] * found.rows / len(found.sample),
    }


def _at_most(memory: _Memory, passages: int, model: EmbeddingModel) -> int:
    """Returns the most that is held: all passages of a shard are tokenised at once, and then encoded."""
    vectors = 2 * 4 * model.dim * passages if model.device.type == "cuda" else 0
    return round(memory.base + memory.per_passage * passages + memory.forward + vectors)


def _fleet(config: PlanEncodeConfig, outline: EmbeddingModel, sample: _Sample, rows: int) -> FleetEstimate:
    # Imported after all measurements: it brings along what training needs, and encoding does without.
    from llara.plan.fleet import Load, estimate_encoding

    assert config.fleet is not None
    fleet, budget = parse_fleet(config.fleet), config.token_budget or GPU_BUDGET
    cells = padded(sample.lengths, budget)
    load = Load(
        cells=cells * rows / len(sample.lengths) / fleet.number,
        cells_per_pass=budget,
        width=round(cells / len(sample.lengths)),
        slots=0,
    )
    return estimate_encoding(config, outline, fleet, load)


def _notes(found: Survey, texts: Sequence[Document], speed: _Speed | None, reason: str) -> tuple[str, ...]:
    notes = [found.counting("tokens"), *found.remarks]
    if len(texts) < len(found.sample):
        notes.append(f"{len(found.sample) - len(texts):,} of {len(found.sample):,} rows are bad and would be left out")
    if speed is None:
        return (*notes, reason)
    return (
        *notes,
        f"time: {speed.passages:,} passages of the sample were encoded, and the whole sample stored",
        "memory: the process with its model, and what the passages of one shard take beside it",
    )
