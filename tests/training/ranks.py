"""Trains in two processes, and in one that does the work of both, and leaves what came of it in a folder.

    python -m tests.training.ranks BASE CORPUS FOLDER

Each scenario writes files into FOLDER; `test_ranks.py` compares them.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported once, here, instead of in every child
import torch

from llara.config import AdaptConfig
from llara.errors import LlaraError
from llara.training.adapt import adapt
from llara.training.parallel import Ranks, join, leave
from llara.training.trainer import JobTrainer
from tests.training.helpers import adapt_config
from tests.training.processes import fork_ranks
from tests.training.rows import NAN, gradients_of, make_trainer, weights_of

# Five batches for two processes: the second step has one left, for one of them.
UNEVEN: dict[str, Any] = {"steps": 2, "batches": 5, "cut": 3, "learning_rate": 0.0, "max_grad_norm": 0.0}
RUN: dict[str, Any] = {
    "steps": None,
    "max_chunks": 20,
    "batch_size": 3,
    "save_every": 2,
    "log_every": 2,
    "token_budget": 60,
}
KILLED_AT = 3


def gradients(folder: Path, accumulation: int, ranks: Ranks) -> None:
    """Writes the gradient of each step."""
    trainer, source = make_trainer(folder / "work", accumulation=accumulation, ranks=ranks, **UNEVEN)
    torch.save({"gradients": gradients_of(trainer), "asked": source.asked}, folder / f"rank-{ranks.rank}.pt")


def stopped(folder: Path, where: str, ranks: Ranks) -> None:
    """Writes what a process says when the loss or the gradient is no number in one of them."""
    bad = {7: (where, NAN)}  # of the second step, in the second process
    trainer, _ = make_trainer(folder / "work", bad=bad, accumulation=2, ranks=ranks, steps=3, save_every=1)
    try:
        trainer.run()
    except LlaraError as error:
        finite = bool(torch.isfinite(weights_of(trainer)).all())
        said = {"said": str(error), "step": trainer.state.global_step, "finite": finite}
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(said))


def run(config: AdaptConfig, seen: Path, killed: int | None = None) -> None:
    """Adapts, and writes down the rows of each of this process's batches; `killed` is a step to die in."""
    rank = int(os.environ.get("RANK", "0"))
    original = JobTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, counts: Any = None) -> Any:
        # An empty pass is a row of the template alone, which this tokenizer's BOS makes.
        rows = [
            row[:length].tolist()
            for each in inputs["passes"]
            for row, length in zip(each["shared"], each["text_lengths"].tolist(), strict=True)
            if length > 1
        ]
        with (seen / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([inputs["number"], rows, len(inputs["passes"])]) + "\n")
        if rank == 1 and self.state.global_step == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, model, inputs, counts)

    JobTrainer.training_step = training_step  # type: ignore[method-assign]
    result = adapt(config)
    (seen / f"result-{rank}.json").write_text(json.dumps([str(result.output), result.steps, dict(result.log)]))
    during = threads()
    leave()
    (seen / f"threads-{rank}.json").write_text(json.dumps([during, threads()]))


def threads() -> list[str]:
    """What this process's threads are called, those of libraries among them; Linux only."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def main() -> None:
    torch.set_num_threads(1)
    base, corpus, folder = map(Path, sys.argv[1:4])

    def scenario(name: str, job: Callable[[Path], None], world: int = 2) -> list[int]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return fork_ranks(lambda _: job(folder / name), world)

    def config(where: Path, **changes: Any) -> AdaptConfig:
        return adapt_config(base, corpus, where / "model", **{**RUN, **changes})

    def ranks(where: Path) -> Ranks:
        return join(config(where))

    codes = {
        "one": scenario("one", lambda where: gradients(where, accumulation=4, ranks=Ranks()), world=1),
        "two": scenario("two", lambda where: gradients(where, accumulation=2, ranks=ranks(where))),
        "bad-loss": scenario("bad-loss", lambda where: stopped(where, "loss", ranks(where))),
        "bad-gradient": scenario("bad-gradient", lambda where: stopped(where, "gradient", ranks(where))),
        "alone": scenario("alone", lambda where: run(config(where, accumulation=2), where), world=1),
        "together": scenario("together", lambda where: run(config(where), where)),
        "killed": scenario("killed", lambda where: run(config(where), where, KILLED_AT)),
        "resumed": scenario("killed", lambda where: run(config(where), where)),
        "again": scenario("killed", lambda where: run(config(where), where)),
    }
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
