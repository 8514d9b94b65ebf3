"""Trains in children that die by SIGKILL at chosen moments and go on in others, and prints what came of it.

    python -m tests.training.crash JOB BASE DATA FOLDER

For `finetune`, DATA is a folder of train.jsonl, more.jsonl and dev.jsonl.

A moment is one step that touches the disk or one batch being made, before or after it. The first child lives to the end
and names its moments; of these some are picked, and each cell (a folder of its own) dies at one or two of them. One
line of JSON per cell tells what every child did. All children fork from one process that has the imports done.
"""

import json
import os
import random
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported once, here, instead of in every child
import torch

from llara import contract
from llara.training import adapt as adapt_module
from llara.training import checkpoint
from llara.training import finetune as finetune_module
from llara.training.trainer import JobTrainer
from tests.training.helpers import adapt_config, finetune_config

# Saves at 3, 6, 9 and 10 steps, logs at 4 and 8, 60 rows drawn from a number of rows that does not divide them.
SETTINGS: dict[str, Any] = {
    "steps": 10,
    "batch_size": 3,
    "accumulation": 2,
    "save_every": 3,
    "log_every": 4,
    "keep": 2,
    "lora_rank": 2,
    "lora_dropout": 0.3,
}

# Batches of either set, several passes each, of which the first keeps its graph; measured at 2, 4, ... and the last.
FINETUNE: dict[str, Any] = {
    "token_budget": 48,
    "graph_budget": 48,
    "negatives": 1,
    "distill": "kl",
    "matryoshka_dims": (8,),
    "mixing": 0.5,
    "measure_every": 2,
}

# Killed in 20 steps of one run. An epoch has 22 chunks in 8 batches and so ends inside a step of 3 batches; a batch is
# cut into passes by tokens; the last step, the 27th, is short of a batch.
OFTEN: dict[str, Any] = {
    "steps": None,
    "epochs": 10.0,
    "max_chunks": 22,
    "batch_size": 3,
    "accumulation": 3,
    "token_budget": 60,
    "save_every": 2,
    "log_every": 3,
    "measure_every": 4,
}
KILLS = 20


class Moments:
    """Names moments, and kills the process at the one with the number or the name `last`."""

    def __init__(self, last: int | str) -> None:
        self.last = last
        self.names: list[str] = []

    def watch(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            # The second argument of a rename is where the thing goes; a descriptor has no name.
            named = [
                re.sub(r"^\.tmp-\d+-", ".tmp-", Path(str(arg)).name) for arg in args[:2] if isinstance(arg, str | Path)
            ]
            what = f"{kind} {' '.join(named)}".strip()
            self.tick(f"before {what}")
            result = function(*args, **kwargs)
            self.tick(f"after {what}")
            return result

        return watched

    def tick(self, name: str) -> None:
        self.names.append(name)
        if self.last in (len(self.names), name):
            os.kill(os.getpid(), signal.SIGKILL)


def record_batches(seen: Path, moments: Moments) -> None:
    """Makes the trainer write down the number and the rows of every batch that it trains on."""
    original = JobTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, counts: Any = None) -> Any:
        moments.tick(f"batch {inputs['number']}")
        rows = [each[key] for each in inputs["passes"] for key in ("ids", "shared") if key in each]
        plain = [row.tolist() if isinstance(row, torch.Tensor) else row for row in rows]
        with seen.open("a", encoding="utf-8") as file:
            file.write(json.dumps([inputs["number"], plain]) + "\n")
        return original(self, model, inputs, counts)

    JobTrainer.training_step = training_step  # type: ignore[method-assign]


def child(job: str, base: Path, data: Path, cell: Path, attempt: int, last: int | str) -> list[str]:
    moments = Moments(last)
    record_batches(cell / f"seen-{attempt}.jsonl", moments)
    JobTrainer.training_step = moments.watch("batch", JobTrainer.training_step)  # type: ignore[method-assign]
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, moments.watch(name, getattr(os, name)))
    torch.save = moments.watch("torch.save", torch.save)
    checkpoint.save_file = moments.watch("save_file", checkpoint.save_file)
    if job == "adapt":
        adapt_module.adapt(adapt_config(base, data, cell / "model", **SETTINGS))
    elif job == "adapt-often":
        adapt_module.adapt(adapt_config(base, data, cell / "model", **SETTINGS | OFTEN))
    else:
        config = finetune_config(base, data / "train.jsonl", cell / "model", **SETTINGS, **FINETUNE)
        paths = {"train": (*config.train, data / "more.jsonl"), "dev": (data / "dev.jsonl",)}
        finetune_module.finetune(replace(config, **paths))
    return moments.names


def run(job: str, base: Path, data: Path, cell: Path, attempt: int, last: int | str) -> dict[str, Any]:
    """Runs one child and returns how it ended, and what it left."""
    answer, seen = cell.parent / f"{cell.name}.json", cell / f"seen-{attempt}.jsonl"
    seen.touch()
    pid = os.fork()
    if pid == 0:
        try:
            answer.write_text(json.dumps(child(job, base, data, cell, attempt, last)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    report: dict[str, Any] = {"status": status, "left": sorted(path.name for path in cell.iterdir())}
    report["seen"] = [json.loads(line) for line in seen.read_text().splitlines()]
    if (cell / "model").exists():  # then it is complete, whenever the child died
        made = contract.read_record(cell / "model")
        report["checked"] = made is not None and contract.check_files(cell / "model", made, full=True)
    else:  # until then, so is every checkpoint; afterwards they are being removed
        for path in checkpoint.list_checkpoints(cell / "model.partial"):
            checkpoint.check_checkpoint(path)
    if status == 0:
        report["moments"] = json.loads(answer.read_text())
    return report


STAGED, NAMED = "before rename checkpoint-6 checkpoint-6", "after rename checkpoint-6 checkpoint-6"
CELLS: dict[str, list[list[int | str]]] = {
    "adapt": [
        [STAGED],
        [NAMED],
        [STAGED, "before rename checkpoint-9 checkpoint-9"],  # dies again after it saved step 6 a second time
        ["before torch.save optimizer.pt"],
        ["after rename checkpoint-3 .tmp-checkpoint-3"],  # the oldest is being removed
        ["before replace .tmp-llara.json llara.json"],  # all files but the contract
        ["before rename model model"],
        ["after rename model model"],  # complete, but not tidied up
        ["before rmdir chunks"],
    ],
    "finetune": [
        ["after save_file weights.safetensors"],
        ["after rename .tmp-best-2 best-2"],
        ["after rename checkpoint-6 checkpoint-6", "after rename checkpoint-9 checkpoint-9"],
        ["before rename model model"],
    ],
}


def pick(job: str, names: list[str]) -> list[list[int | str]]:
    """Returns the moments at which the cells die: around publishing, and some at random."""
    rng = random.Random(0)
    if job == "adapt-often":
        return [[f"batch {3 * step + rng.randrange(3)}" for step in sorted(rng.sample(range(27), KILLS))]]
    begun = next(number for number, name in enumerate(names, start=1) if "batch" in name)
    few = 3 if job == "adapt" else 1
    return [
        *CELLS[job],
        *([rng.randrange(begun, len(names))] for _ in range(few)),
        [rng.randrange(begun, begun + 60), 60],
    ]


def main() -> None:
    torch.set_num_threads(1)
    job, base, data, folder = sys.argv[1], *map(Path, sys.argv[2:5])
    (folder / "reference").mkdir(parents=True)
    reference = run(job, base, data, folder / "reference", 0, 0)
    print(json.dumps({"cell": "reference", "runs": [reference]}), flush=True)
    for number, moments in enumerate(pick(job, reference["moments"])):
        cell = folder / str(number)
        cell.mkdir()
        runs = [run(job, base, data, cell, attempt, last) for attempt, last in enumerate([*moments, 0])]
        print(json.dumps({"cell": cell.name, "moments": moments, "runs": runs}), flush=True)


if __name__ == "__main__":
    main()
