"""What `adapt` would take: a sample prepared as it would be, a few real steps, and the whole in their proportion."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llara.config import AdaptConfig
from llara.encoding.documents import document_line
from llara.errors import DataError
from llara.hardware import parse_fleet
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.plan.calibrate import Cells, Speed, look_at, train_a_little
from llara.plan.config import GPU_BUDGET, PlanAdaptConfig, command_line
from llara.plan.corpus import Survey, documents, survey
from llara.plan.fleet import Load, estimate_training
from llara.plan.measure import (
    Clock,
    device_memory,
    device_name,
    folder_bytes,
    forget_peak,
    free_disk,
    peak_memory,
    scratch,
)
from llara.plan.report import NOTHING, Estimate, FleetEstimate, size
from llara.progress import hushed, note
from llara.records import Document
from llara.training.adapt import assemble, choose_passes, objective_of, prepare
from llara.training.arguments import steps_for
from llara.training.chunks import ChunkStore
from llara.training.lora import add_lora

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


class _Sizes(NamedTuple):
    """Bytes on the disk: prepared text, one checkpoint, the model; and how many checkpoints are kept."""

    text: int
    checkpoint: int
    model: int


def estimate(config: PlanAdaptConfig, started: float) -> Estimate:
    """Returns the plan; `started` is how many seconds the start of the process took. See `jobs.plan_adapt`."""
    found = survey(config.corpus, config.sample, config.seed)
    texts = documents(found.sample)
    outline = _outline(config)
    reason = _why_not_run(config, outline)
    clock = Clock()
    forget_peak()
    with clock.part("start"):
        model = outline if reason else load_model(config, for_training=True, new_template=True)
        objective = objective_of(config, model)
        template = model.bind()
        model.check_length(
            config.chunk_length + max(template.query.overhead, template.passage.overhead),
            "--chunk-length with the template",
        )
        if not reason:
            objective = choose_passes(objective, model, template, config)
            assert model.fingerprint  # reads the weights once more, as the job does
    with scratch(config.output) as folder:
        with clock.part("prepare"):
            chunks = _prepare(folder, config, model, texts)
        amounts = _amounts(config, found, chunks)
        _, source = assemble(config, model, objective, chunks)
        cells = look_at(source)
        speed, memory = None, None
        if not reason:
            note(f"calibrating: about {config.calibrate:g} s of training on {len(texts):,} documents of the corpus")
            if config.lora_rank:
                add_lora(model, config)
            operations = 6.0 * sum(weight.numel() for weight in model.lm.parameters())
            speed = train_a_little(config, model, objective, chunks, folder, config.calibrate, operations)
            memory = peak_memory(model.device)
        sizes = _sizes(config, model, folder, found, speed)
        fleet = _fleet(config, chunks, amounts) if config.fleet else None
    seconds = None
    if speed is not None:
        seconds = _seconds(config, found, clock, started, amounts, cells, speed, sizes)
    return Estimate(
        job="adapt",
        corpus=", ".join(map(str, config.corpus)),
        amounts=_shown(found, amounts, cells, config),
        hardware=device_name(model.device, next(model.lm.parameters()).dtype) if not reason else NOTHING,
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


def _outline(config: PlanAdaptConfig) -> EmbeddingModel:
    with hushed():
        return load_model(config, for_training=True, new_template=True, weights=False)


def _why_not_run(config: PlanAdaptConfig, outline: EmbeddingModel) -> str:
    """Returns why no step can be tried here, or nothing."""
    if not config.calibrate:
        return "nothing was run (--calibrate 0), so neither time nor memory here is known"
    count = sum(weight.numel() for weight in outline.lm.parameters())
    # float32, or frozen bfloat16 with little on top; trained weights have gradients and two moments beside them.
    gpu = torch.cuda.is_available() and config.device != "cpu"
    needed = count * ((2 if gpu else 4) if config.lora_rank else 16)
    here = device_memory(torch.device("cuda" if gpu else "cpu"))
    if here is not None and needed > here:
        return f"nothing was run: it needs more than {size(needed)} of memory, and {size(here)} are here"
    return ""


def _prepare(folder: Path, config: PlanAdaptConfig, model: EmbeddingModel, texts: Sequence[Document]) -> ChunkStore:
    """Prepares the sample as the job would prepare the corpus."""
    file = folder / "sample.jsonl"
    file.write_bytes(b"".join(map(document_line, texts)))
    try:
        with hushed():
            return prepare(folder / "chunks", replace(config, corpus=(file,)), model)
    except DataError as error:  # which names the sample's file
        raise DataError(", ".join(map(str, config.corpus)), None, f"in a sample of it: {error.reason}") from error


def _amounts(config: PlanAdaptConfig, found: Survey, chunks: ChunkStore) -> _Amounts:
    count = round(len(chunks) * found.scale)
    trained = min(max(count - getattr(config, "held_out", 0), 1), config.max_chunks or count)
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
    )


def _sizes(config: PlanAdaptConfig, model: EmbeddingModel, folder: Path, found: Survey, speed: Speed | None) -> _Sizes:
    weights = [(weight.numel(), weight.element_size(), weight.requires_grad) for weight in model.lm.parameters()]
    model.tokenizer.save_pretrained(folder / "tokenizer")
    trained = sum(count * width for count, width, needed in weights if needed)
    return _Sizes(
        text=round(folder_bytes(folder / "chunks") * found.scale),
        checkpoint=speed.checkpoint_bytes if speed else 3 * trained,
        model=sum(count * width for count, width, _ in weights) + folder_bytes(folder / "tokenizer"),
    )


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
    found: Survey,
    clock: Clock,
    started: float,
    amounts: _Amounts,
    cells: Cells,
    speed: Speed,
    sizes: _Sizes,
) -> dict[str, float]:
    step = speed.per_step + speed.per_cell * cells.cells * config.accumulation
    writing = speed.checkpoint_seconds / max(speed.checkpoint_bytes, 1)
    return {
        "start": started + clock.seconds["start"] + _hashing(config.corpus),
        "prepare": found.read_seconds + clock.seconds["prepare"] * found.scale,
        "train": speed.first + step * amounts.steps,
        "measure": speed.measure_seconds * amounts.measurements,
        "checkpoints": speed.checkpoint_seconds * amounts.checkpoints,
        "publish": writing * sizes.model,
    }


def _hashing(paths: Sequence[Path]) -> float:
    """Returns about how long the fingerprint of the corpus takes."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    began = time.perf_counter()
    with files[0].open("rb") as stream:
        read = stream.read(HASHED)
    hashlib.sha256(read).digest()
    return (time.perf_counter() - began) * sum(file.stat().st_size for file in files) / max(len(read), 1)


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


def _shown(found: Survey, amounts: _Amounts, cells: Cells, config: PlanAdaptConfig) -> dict[str, float]:
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
    how = "counted" if found.counted else "estimated"
    notes = [
        f"documents were {how}; tokens and chunks are those of {len(found.sample):,} of them, in proportion to bytes",
        *found.remarks,
    ]
    if speed is None:
        return (*notes, reason)
    notes.append(f"time: {speed.steps:,} real steps on the sample, scaled by padded tokens; one real checkpoint")
    if speed.reduced:
        notes.append("a whole step would have taken longer than --calibrate, so smaller batches were tried")
    notes.append("memory: the most that those steps held; a larger corpus takes little more")
    return tuple(notes)
