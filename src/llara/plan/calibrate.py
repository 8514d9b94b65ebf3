"""A few real steps of adaptation, run by the real trainer in a scratch folder, and what they took."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback

from llara.model import EmbeddingModel
from llara.plan.config import PlanAdaptConfig
from llara.plan.measure import Clock, folder_bytes
from llara.progress import hushed
from llara.training.adapt import assemble, recall
from llara.training.chunks import ChunkStore
from llara.training.lora import add_lora
from llara.training.objective import AdaptModule, Plan
from llara.training.source import ChunkSource
from llara.training.trainer import JobTrainer

MOST_STEPS = 10_000
BATCHES_LOOKED_AT = 64
# Guesses, only to choose a batch that a calibration has time for: operations per second.
LIKELY_SPEED = {"cpu": 1e11, "cuda": 5e13}


class Cells(NamedTuple):
    """What a batch of a source holds on average: padded and real tokens, rows, and the largest forward pass."""

    cells: float
    tokens: float
    rows: float
    largest_pass: int


class Speed(NamedTuple):
    """What training takes: seconds per padded token and per optimizer step, of a checkpoint, per held-out chunk.

    `once` is what a run takes beyond its steps. `steps` were run, `reduced` with a smaller batch than asked.
    """

    per_cell: float
    per_step: float
    once: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    per_measured: float
    steps: int
    reduced: bool


def look_at(source: ChunkSource) -> Cells:
    """Returns what batches of a source hold, by looking at up to `BATCHES_LOOKED_AT` of them."""
    numbers = range(min(source.batches_per_pass, BATCHES_LOOKED_AT))
    batches = [source.passes(number) for number in numbers]
    return Cells(
        cells=float(np.mean([sum(each["cells"] for each in batch) for batch in batches])),
        tokens=float(np.mean([sum(each["tokens"] for each in batch) for batch in batches])),
        rows=float(np.mean([len(source.rows(number)) for number in numbers])),
        largest_pass=max(each["cells"] for batch in batches for each in batch),
    )


class _StepTimes(TrainerCallback):
    """Seconds of each step, and of the optimizer within it; ends the run when its time is over."""

    def __init__(self, seconds: float) -> None:
        self.limit = seconds
        self.steps: list[float] = []
        self.updates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.last = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updates.append(time.perf_counter() - self.update)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now
        # Two at least, where there is time for more than one: the first step allocates.
        if now - self.began + self.steps[-1] > self.limit:
            control.should_training_stop = True


def train_a_little(
    config: PlanAdaptConfig, model: EmbeddingModel, objective: Plan, chunks: ChunkStore, folder: Path
) -> Speed:
    """Trains for about `config.calibrate` seconds, one step at least, writes one checkpoint, and measures once.

    The model is changed, and of no use afterwards. A batch that would take far longer than that is made smaller.

    Args:
        config: The job's configuration.
        model: Opened for training.
        objective: How the objective runs on it.
        chunks: A sample of the corpus.
        folder: Scratch.
    """
    config = replace(config, steps=MOST_STEPS, save_every=MOST_STEPS, measure_every=MOST_STEPS, report_to=())
    if config.lora_rank:
        add_lora(model, config)
    smaller = _affordable(config, model, look_at(assemble(config, model, objective, chunks)[1]))
    reduced, config = smaller != config, smaller
    module, source = assemble(config, model, objective, chunks)
    clock, times = Clock(), _StepTimes(config.calibrate)
    with hushed():
        with clock.part("run"):
            trainer = JobTrainer(module, source, config, folder, MOST_STEPS, "calibrate")
            trainer.add_callback(times)
            trainer.run()
        with clock.part("checkpoint"):
            trainer._save_checkpoint(trainer.model, None)  # type: ignore[arg-type]
        with clock.part("measure"):
            measured = _measure(module, source)
    written = sum(folder_bytes(path) for path in folder.glob("checkpoint-*"))
    cells = [
        sum(each["cells"] for number in range(config.accumulation) for each in source.passes(first + number))
        for first in range(0, len(times.steps) * config.accumulation, config.accumulation)
    ]
    per_cell, per_step = _line(times, cells)
    return Speed(
        per_cell=per_cell,
        per_step=per_step,
        once=max(clock.seconds["run"] - per_step * len(cells) - per_cell * sum(cells), 0.0),
        checkpoint_seconds=clock.seconds["checkpoint"],
        checkpoint_bytes=written,
        per_measured=clock.seconds["measure"] / max(measured, 1),
        steps=len(times.steps),
        reduced=reduced,
    )


def _line(times: _StepTimes, cells: list[int]) -> tuple[float, float]:
    """Returns seconds per padded token and per step. Of several steps the first is left out: it sets things up."""
    some = slice(1 if len(cells) > 1 else 0, None)
    updates = sum(times.updates[some])
    return (sum(times.steps[some]) - updates) / sum(cells[some]), updates / len(cells[some])


def _affordable(config: PlanAdaptConfig, model: EmbeddingModel, cells: Cells) -> PlanAdaptConfig:
    """Returns the configuration, with smaller batches where three steps would take far longer than there is time."""
    operations = 6.0 * sum(weight.numel() for weight in model.lm.parameters())
    affordable = config.calibrate * LIKELY_SPEED.get(model.device.type, 1e12) / operations / 3
    rows = int(affordable / cells.cells * cells.rows)
    if rows >= config.batch_size * config.accumulation:
        return config
    return replace(config, batch_size=max(min(rows, config.batch_size), 1), accumulation=1)


def _measure(module: AdaptModule, source: ChunkSource) -> int:
    """Measures once on the held-out chunks of the sample; returns how many there are."""
    measure = recall(module, source)
    if measure is None:
        return 0
    module.eval()
    with torch.no_grad():
        measure()
    return sum(len(batch["text_lengths"]) for batch in source.held_out())
