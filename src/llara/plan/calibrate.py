"""A few real steps of adaptation, run by the real trainer in a scratch folder, and what they took."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback

from llara.config import AdaptConfig
from llara.model import EmbeddingModel
from llara.plan.measure import Clock, folder_bytes
from llara.progress import hushed
from llara.training.adapt import assemble, recall
from llara.training.chunks import ChunkStore
from llara.training.objective import Plan
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
    """What training takes: seconds per padded token and per optimizer step, of a checkpoint, of a measurement.

    `first` is what the first step takes beyond the others. `steps` were run, `reduced` with a smaller batch than asked.
    """

    per_cell: float
    per_step: float
    first: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    measure_seconds: float
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
    config: AdaptConfig,
    model: EmbeddingModel,
    objective: Plan,
    chunks: ChunkStore,
    folder: Path,
    seconds: float,
    operations_per_cell: float,
) -> Speed:
    """Trains for about `seconds`, one step at least, writes one checkpoint, and measures once.

    The model is changed, and of no use afterwards. A batch that would take far longer than that is made smaller.

    Args:
        config: The job's configuration.
        model: Opened for training, LoRA injected.
        objective: How the objective runs on it.
        chunks: A sample of the corpus.
        folder: Scratch.
        seconds: How long.
        operations_per_cell: About how many a padded token takes.
    """
    config = replace(config, steps=MOST_STEPS, save_every=MOST_STEPS, measure_every=MOST_STEPS, report_to=())
    _, source = assemble(config, model, objective, chunks)
    whole = look_at(source).cells * config.accumulation
    affordable = seconds * LIKELY_SPEED.get(model.device.type, 1e12) / operations_per_cell / 3
    reduced = affordable < whole
    if reduced:
        rows = max(int(config.batch_size * config.accumulation * affordable / whole), 1)
        config = replace(config, batch_size=rows, accumulation=1)
    module, source = assemble(config, model, objective, chunks)
    with hushed():
        trainer = JobTrainer(module, source, config, folder, MOST_STEPS, "calibrate")
        times = _StepTimes(seconds)
        trainer.add_callback(times)
        trainer.run()
        clock = Clock()
        with clock.part("checkpoint"):
            trainer._save_checkpoint(trainer.model, None)  # type: ignore[arg-type]
        with clock.part("measure"):
            _measure(module, source)
    written = sum(folder_bytes(path) for path in folder.glob("checkpoint-*"))
    # Of several steps the first is left out, and so counted once.
    done, updates = (times.steps[1:], times.updates[1:]) if len(times.steps) > 1 else (times.steps, times.updates)
    numbers = range(len(times.steps) * config.accumulation)[-len(done) * config.accumulation :]
    cells = sum(each["cells"] for number in numbers for each in source.passes(number))
    return Speed(
        per_cell=(sum(done) - sum(updates)) / cells,
        per_step=sum(updates) / len(updates),
        first=max(times.steps[0] - sum(done) / len(done), 0.0),
        checkpoint_seconds=clock.seconds["checkpoint"],
        checkpoint_bytes=written,
        measure_seconds=clock.seconds["measure"],
        steps=len(times.steps),
        reduced=reduced,
    )


def _measure(module: Any, source: ChunkSource) -> None:
    measure = recall(module, source)
    if measure is not None:
        module.eval()
        with torch.no_grad():
            measure()
