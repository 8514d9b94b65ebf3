"""A trainer over a handful of rows, with batches that can be made bad: what the tests of the trainer stand on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from llara.config import AdaptConfig
from llara.model import EmbeddingModel
from llara.training.objective import NAMES, AdaptModule, Plan, Prompts, collate
from llara.training.parallel import Ranks
from llara.training.trainer import Batch, JobTrainer
from tests import tiny
from tests.training.helpers import adapt_config

PLAN = Plan("ebae+ebar", True, 1.0, 0.5)
NAN, INF = float("nan"), float("inf")
Bad = Mapping[int, tuple[str, float]]


def make_rows(count: int) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Texts of 3 to 9 tokens; every third has no next text."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        text = rng.integers(5, 300, size=int(rng.integers(3, 10)))
        rows.append((text, rng.integers(5, 300, size=0 if number % 3 == 0 else 4)))
    return rows


class Rows:
    """Serves rows in order, `size` at a time, and remembers the numbers of the batches asked for.

    A batch is cut into passes of `cut` rows. `bad` says in which batches the loss or the gradient becomes a value.
    """

    names: tuple[str, ...] = NAMES

    def __init__(self, prompts: Prompts, size: int, bad: Bad, cut: int, batches: int | None) -> None:
        self.prompts, self.size, self.bad, self.cut, self.batches = prompts, size, bad, cut, batches
        self.rows = make_rows(24)
        self.asked: list[int] = []

    def passes(self, number: int) -> list[Batch]:
        assert self.batches is None or number < self.batches
        self.asked.append(number)
        picked = [self.rows[i % len(self.rows)] for i in range(number * self.size, (number + 1) * self.size)]
        made = [self.collate(picked[start : start + self.cut]) for start in range(0, len(picked), self.cut)]
        if number in self.bad:
            made[-1]["bad"] = self.bad[number]
        return made

    def collate(self, rows: list[Any]) -> Batch:
        return collate([text for text, _ in rows], [following for _, following in rows], self.prompts, PLAN)

    def empty(self) -> Batch:
        nothing = np.empty(0, dtype=np.int64)
        return collate([nothing], [nothing], self.prompts, PLAN)

    def describe(self, number: int) -> list[str]:
        return [f"row {i % len(self.rows)}" for i in range(number * self.size, (number + 1) * self.size)]


class Spoilt(AdaptModule):
    """The objective, but in a bad batch the loss, or the gradient under a loss that is fine, is not a number."""

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        loss, sums = super().forward(batch, counts)
        where, value = batch.get("bad", ("", 0.0))
        if where == "loss":
            loss = loss * value
        if where == "gradient":
            one = next(self.parameters()).flatten()[0] * 1.0
            one.register_hook(lambda gradient: gradient * value)
            loss = loss + (one - one.detach())
        return loss, sums


def prompts_of(model: EmbeddingModel) -> Prompts:
    template = model.bind()
    return Prompts(template.passage, template.query, model.pad_id)


def make_trainer(
    folder: Path,
    steps: int = 4,
    bad: Bad | None = None,
    cut: int = 100,
    batches: int | None = None,
    ranks: Ranks | None = None,
    measure: Any = None,
    **changes: Any,
) -> tuple[JobTrainer, Rows]:
    """A trainer over `Rows` with a tiny model; `changes` are settings."""
    folder.mkdir(exist_ok=True)
    config: AdaptConfig = adapt_config(Path("base"), Path("text"), folder / "out", steps=steps, **changes)
    model, prompts = tiny.model(), prompts_of(tiny.model())
    source = Rows(prompts, config.batch_size, bad or {}, cut, batches)
    module = Spoilt(model, prompts, PLAN)
    return JobTrainer(module, source, config, folder, steps, "test", ranks, measure), source


def weights_of(trainer: JobTrainer) -> Tensor:
    """All weights in one row."""
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()]).clone()


def gradients_of(trainer: JobTrainer) -> list[Tensor]:
    """Runs a trainer and returns the gradient of each step, as the optimizer sees it."""
    found: list[Tensor] = []

    class Look(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.append(torch.cat([value.grad.flatten().clone() for value in trainer.model.parameters()]))

    trainer.add_callback(Look())
    trainer.run()
    return found
