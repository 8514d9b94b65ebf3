"""What `adapt` would take: a sample prepared as it would be, a few real steps, and the whole in their proportion."""

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llara.config import AdaptConfig
from llara.data.lines import walk_files
from llara.encoding.documents import document_line
from llara.errors import ConfigError, DataError
from llara.hardware import parse_fleet
from llara.loading import load_model, pick_device, pick_dtype, trains_in_full
from llara.model import EmbeddingModel
from llara.plan.calibrate import Cells, Speed, look_at, train_a_little
from llara.plan.config import GPU_BUDGET, PlanAdaptConfig, command_line
from llara.plan.corpus import Survey, documents, survey
from llara.plan.fleet import Load, estimate_training, with_lora
from llara.plan.measure import (
    device_memory,
    device_name,
    extend,
    folder_bytes,
    forget_peak,
    free_disk,
    make_twice,
    peak_memory,
    scratch,
)
from llara.plan.report import NOTHING, Estimate, FleetEstimate, size
from llara.progress import hushed, note
from llara.records import Document
from llara.training.adapt import assemble, choose_passes, objective_of, prepare
from llara.training.arguments import steps_for
from llara.training.chunks import ChunkStore
from llara.training.objective import Plan
from llara.training.source import HELD_OUT_SHARE

CHUNKS = "chunks"
LEAST = 50  # documents of a quarter of the sample that is worth measuring
FIXED = ("frequency.bin", "chunks.json")  # of the prepared text, what does not grow with the corpus
LOG_LINE = 400  # bytes of a line in the log
PROBE_NUMBERS = 80  # bytes per dimension of the vectors that are kept beside the weights: six, in digits
HASHED = 64 * 2**20  # bytes of the corpus that are read to see how fast its fingerprint is made


class _Amounts(NamedTuple):
    """What the run comes to, in the proportion of the sample."""

    tokens: float
    chunks: int
    chained: int
    batches_per_pass: int
    steps: int
    batches: int
    checkpoints: int
    measurements: int
    measured: int


class _Sizes(NamedTuple):
    """Bytes on the disk: prepared text, one checkpoint, the model; and how many checkpoints are kept."""

    text: int
    checkpoint: int
    model: int


def estimate(config: PlanAdaptConfig, started: float) -> Estimate:
    """Returns the plan; `started` is how many seconds the start of the process took. See `jobs.plan_adapt`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("plan adapt: runs in one process; start it without torchrun, and name the GPUs with --fleet")
    found = survey(config.corpus, config.sample, config.seed)
    texts = documents(found.sample, needs_id=False)
    outline, first = make_twice(lambda: _outline(config))
    reason = _why_not_run(config, outline)
    began = time.perf_counter()
    model, objective = _open(config, outline if reason else None)
    started += first + time.perf_counter() - began + _hashing(config.corpus)
    speed = memory = seconds = fleet = None
    with scratch(config.output) as folder:
        chunks, preparing = _prepare(folder, config, model, texts, found.scale)
        amounts = _amounts(config, found, chunks)
        cells = look_at(assemble(config, model, objective, chunks)[1])
        if not reason:
            note(f"calibrating: about {config.calibrate:g} s of training on {len(texts):,} documents of the corpus")
            speed = train_a_little(config, model, objective, chunks, folder)
            memory = peak_memory(model.device)
        sizes = _sizes(config, outline, folder, found, amounts, speed.checkpoint_bytes if speed else 0)
        if config.fleet:
            fleet = _fleet(config, chunks, amounts)
    if speed is not None:
        seconds = _seconds(config, started, found.read_seconds + preparing, amounts, cells, speed, sizes)
    return Estimate(
        job="adapt",
        corpus=", ".join(map(str, config.corpus)),
        amounts=_shown(config, found, amounts, cells),
        hardware=NOTHING if reason else device_name(model.device, next(model.lm.parameters()).dtype),
        seconds=seconds,
        memory=memory,
        memory_here=device_memory(model.device),
        disk=_disk(config, amounts, sizes),
        disk_after=sizes.model,
        disk_free=free_disk(config.output),
        fleet=fleet,
        notes=_notes(config, found, speed, reason),
        next_command=command_line("adapt", AdaptConfig, config),
    )


def _open(config: PlanAdaptConfig, outline: EmbeddingModel | None) -> tuple[EmbeddingModel, Plan]:
    """Does what the job does before it reads the corpus, on the model itself or, where it is given, on its outline."""
    if outline is None:
        forget_peak(pick_device(config.device))
    model = outline or load_model(config, for_training=True, new_template=True)
    objective, template = objective_of(config, model), model.bind()
    longest = config.chunk_length + max(template.query.overhead, template.passage.overhead)
    model.check_length(longest, "--chunk-length with the template")
    if outline is None:
        objective = choose_passes(objective, model, template, config)
        assert model.fingerprint  # reads the weights of a base model once more, as the job does
    return model, objective


def _outline(config: PlanAdaptConfig) -> EmbeddingModel:
    with hushed():
        return load_model(config, for_training=True, new_template=True, weights=False)


def _why_not_run(config: PlanAdaptConfig, outline: EmbeddingModel) -> str:
    """Returns why no step can be tried here, or nothing."""
    if not config.calibrate:
        return "nothing was run (--calibrate 0), so neither time nor memory here is known"
    device = pick_device(config.device)
    count = sum(weight.numel() for weight in outline.lm.parameters())
    # Trained weights have gradients and two moments beside them; frozen ones are half as wide on a GPU.
    gpu = device.type == "cuda"
    needed = count * ((2 if gpu else 4) if config.lora_rank else 16)
    here = device_memory(device)
    if here is not None and needed > here:
        return f"nothing was run: it needs more than {size(needed)} of memory, and {size(here)} are here"
    return ""


def _prepare(
    folder: Path, config: PlanAdaptConfig, model: EmbeddingModel, texts: Sequence[Document], scale: float
) -> tuple[ChunkStore, float]:
    """Prepares the sample as the job would prepare the corpus; returns the chunks, and the seconds for the whole."""

    def prepared(name: str, some: Sequence[Document]) -> tuple[ChunkStore, float]:
        file = folder / f"{name}.jsonl"
        file.write_bytes(b"".join(map(document_line, some)))
        began = time.perf_counter()
        with hushed():
            chunks = prepare(folder / name, replace(config, corpus=(file,)), model)
        return chunks, time.perf_counter() - began

    try:
        quarter = len(texts) // 4
        # A quarter first, to tell what is done once from what is done for every document.
        small = (quarter, prepared("quarter", texts[:quarter])[1]) if scale > 1 and quarter >= LEAST else (0, 0.0)
        chunks, taken = prepared(CHUNKS, texts)
    except DataError as error:  # which names the sample's file
        raise DataError(", ".join(map(str, config.corpus)), None, f"in a sample of it: {error.reason}") from error
    return chunks, extend(*small, len(texts), taken, len(texts) * scale)


def _amounts(config: PlanAdaptConfig, found: Survey, chunks: ChunkStore) -> _Amounts:
    count = round(len(chunks) * found.scale)
    out = min(config.held_out, count // HELD_OUT_SHARE)
    trained = min(max(count - out, 1), config.max_chunks or count)
    batches_per_pass = math.ceil(trained / config.batch_size)
    steps = steps_for(config, max(math.ceil(config.epochs * batches_per_pass), 1))
    return _Amounts(
        tokens=float(chunks.lengths(np.arange(len(chunks))).sum()) * found.scale,
        chunks=count,
        chained=round(chunks.chained * found.scale),
        batches_per_pass=batches_per_pass,
        steps=steps,
        batches=steps * config.accumulation,
        checkpoints=math.ceil(steps / config.save_every),
        measurements=math.ceil(steps / config.measure_every),
        measured=out,
    )


def _sizes(
    config: PlanAdaptConfig, outline: EmbeddingModel, folder: Path, found: Survey, amounts: _Amounts, written: int
) -> _Sizes:
    """Returns the sizes on disk; `written` is that of a checkpoint, or 0 where none was written."""
    outline.tokenizer.save_pretrained(folder / "tokenizer")
    beside = LOG_LINE * math.ceil(amounts.steps / config.log_every) + PROBE_NUMBERS * outline.dim
    prepared = folder / CHUNKS
    fixed = sum((prepared / name).stat().st_size for name in FIXED)
    in_full = torch.float32 if trains_in_full(config) else pick_dtype(config.dtype, pick_device(config.device))
    count = sum(weight.numel() for weight in outline.lm.parameters())
    return _Sizes(
        text=round((folder_bytes(prepared) - fixed) * found.scale) + fixed,
        checkpoint=written or _checkpoint(config, outline, in_full.itemsize),
        model=count * in_full.itemsize + folder_bytes(folder / "tokenizer") + beside,
    )


def _checkpoint(config: PlanAdaptConfig, outline: EmbeddingModel, width: int) -> int:
    """Returns the size of a checkpoint: trained weights and two moments of each; those of LoRA are float32."""
    model = with_lora(outline, config, config.lora_rank) if config.lora_rank else outline
    trained: int = sum(weight.numel() for weight in model.lm.parameters() if weight.requires_grad)
    return 3 * trained * (4 if config.lora_rank else width)


def _disk(config: PlanAdaptConfig, amounts: _Amounts, sizes: _Sizes) -> dict[str, int]:
    """Returns what lies on the disk at the worst moment: as the last checkpoint, or the model, is being written."""
    kept = min(amounts.checkpoints, config.keep)
    writing = min(amounts.checkpoints, config.keep + 1)
    parts = {"prepared text": sizes.text}
    if (writing - kept) * sizes.checkpoint > sizes.model:
        return parts | {f"{writing} checkpoints": writing * sizes.checkpoint}
    return parts | {f"{kept} checkpoint{'s' * (kept > 1)}": kept * sizes.checkpoint, "model": sizes.model}


def _seconds(
    config: PlanAdaptConfig,
    started: float,
    preparing: float,
    amounts: _Amounts,
    cells: Cells,
    speed: Speed,
    sizes: _Sizes,
) -> dict[str, float]:
    step = speed.per_step + speed.per_cell * cells.cells * config.accumulation
    writing = speed.checkpoint_seconds / max(speed.checkpoint_bytes, 1)
    return {
        "start": started,
        "prepare": preparing,
        "train": speed.once + step * amounts.steps,
        "measure": speed.per_measured * amounts.measured * amounts.measurements,
        "checkpoints": speed.checkpoint_seconds * amounts.checkpoints,
        "publish": writing * sizes.model,
    }


def _hashing(paths: Sequence[Path]) -> float:
    """Returns about how long the fingerprint of the corpus takes, which reads all of it."""
    total = sum(file.stat().st_size for path in paths for file in (walk_files(path) if path.is_dir() else [path]))
    first = next(file for path in paths for file in (walk_files(path) if path.is_dir() else [path]))
    began = time.perf_counter()
    with first.open("rb") as stream:
        read = stream.read(HASHED)
    hashlib.sha256(read).digest()
    return (time.perf_counter() - began) * total / max(len(read), 1)


def _fleet(config: PlanAdaptConfig, chunks: ChunkStore, amounts: _Amounts) -> FleetEstimate:
    """Returns the estimate for GPUs that are not here. Epochs are shared out among them; steps are as many for each."""
    assert config.fleet is not None
    fleet, outline = parse_fleet(config.fleet), _outline(config)
    objective = objective_of(config, outline)
    _, source = assemble(replace(config, token_budget=config.token_budget or GPU_BUDGET), outline, objective, chunks)
    cells = look_at(source)
    template = outline.bind()
    slots = sum({"self": template.passage, "next": template.query}[branch].slots for branch in objective.branches)
    width = round(cells.cells / cells.rows)
    in_all = max(math.ceil(config.epochs * amounts.batches_per_pass), 1)
    steps = steps_for(config, in_all, fleet.number)
    load = Load(
        cells=steps * config.accumulation * cells.cells,
        cells_per_pass=cells.largest_pass,
        width=width,
        slots=width if objective.objective == "lm" or objective.lm_weight else slots,
    )
    return estimate_training(config, outline, fleet, load)


def _shown(config: PlanAdaptConfig, found: Survey, amounts: _Amounts, cells: Cells) -> dict[str, float]:
    return {
        "documents": found.rows,
        "bytes of text": found.bytes,
        "tokens": round(amounts.tokens),
        "chunks": amounts.chunks,
        "chunks with a next text": amounts.chained,
        "steps": amounts.steps,
        "passes over the text": amounts.batches / amounts.batches_per_pass,
        "tokens per step": round(cells.tokens * config.accumulation),
        "padding": 1 - cells.tokens / cells.cells,
    }


def _notes(config: PlanAdaptConfig, found: Survey, speed: Speed | None, reason: str) -> tuple[str, ...]:
    notes = [found.counting("tokens and chunks"), *found.remarks]
    if config.deduplicate and len(found.sample) < found.rows:
        notes.append("copies of documents will be left out; only those within the sample are, so there may be fewer")
    if speed is None:
        return (*notes, reason)
    steps = "one real step" if speed.steps == 1 else f"{speed.steps:,} real steps"
    notes.append(f"time: {steps} on the sample, scaled by padded tokens; one real checkpoint")
    if speed.reduced:
        notes.append("a whole step would have taken longer than --calibrate, so smaller batches were tried")
    notes.append("memory: the most that those steps held; a larger corpus takes little more")
    return tuple(notes)
