"""Fine-tunes in two processes, and in one that does the work of both, and leaves what came of it in a folder.

    python -m tests.training.finetune_ranks BASE TRAIN FOLDER

`test_finetune_ranks.py` compares the folders.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported once, here, instead of in every child
import torch

from llara.training import finetune as finetune_module
from llara.training import trainer as trainer_module
from llara.training.dev import DevMeasure
from llara.training.finetune import finetune
from llara.training.sharding import is_sharded
from llara.training.trainer import JobTrainer
from tests.training.helpers import finetune_config
from tests.training.processes import fork_ranks
from tests.training.shards import shard

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "learning_rate": 1e-3,
    "negatives": 3,
    "distill": "kl",
    "lora_rank": 2,
    "lora_dropout": 0.0,
    "token_budget": 64,
    "graph_budget": 64,
    "log_every": 1,
    "save_every": 2,
    "measure_every": 2,
}
KILLED_AT = 3


def run(base: Path, train: Path, where: Path, batch_size: int, killed: int | None = None, **changes: Any) -> None:
    """Fine-tunes, and writes down how many passes each batch had; `killed` is a step to die in."""
    rank = int(os.environ.get("RANK", "0"))
    original = JobTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, counts: Any = None) -> Any:
        with (where / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([inputs["number"], len(inputs["passes"])]) + "\n")
        if rank == 1 and self.state.global_step == killed:
            os.kill(os.getpid(), 9)
        return original(self, model, inputs, counts)

    JobTrainer.training_step = training_step  # type: ignore[method-assign]
    chosen = {**SETTINGS, **changes}
    config = finetune_config(base, train, where / "model", batch_size=batch_size, dev=(train,), **chosen)
    result = finetune(config)
    (where / f"result-{rank}.json").write_text(json.dumps([result.steps, dict(result.log)]))


def run_apart(base: Path, train: Path, where: Path) -> None:
    """Fine-tunes with a patience of one, where what rank 0 measures falls in the end and what rank 1 measures rises."""
    rank = int(os.environ["RANK"])
    values = iter((0.4, 0.5, 0.3, 0.2) if rank == 0 else (0.1, 0.2, 0.3, 0.4))
    DevMeasure.__call__ = lambda self, module: {"dev_ndcg": next(values)}  # type: ignore[method-assign]
    run(base, train, where, 3, measure_every=1, patience=1)


def run_sharded(base: Path, train: Path, where: Path, batch_size: int) -> None:
    """Fine-tunes with every weight cut in two, one half per process."""

    class Trainer(JobTrainer):
        def __init__(self, module: Any, *args: Any) -> None:
            shard(module)
            super().__init__(module, *args)
            assert is_sharded(self.module)

    finetune_module.JobTrainer = Trainer  # type: ignore[misc]
    trainer_module.shards = lambda: True
    run(base, train, where, batch_size)


def main() -> None:
    torch.set_num_threads(1)
    base, train, folder = map(Path, sys.argv[1:4])

    def scenario(name: str, world: int, batch_size: int, killed: int | None = None) -> list[int]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return fork_ranks(lambda _: run(base, train, folder / name, batch_size, killed), world)

    def sharded(name: str) -> list[int]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return fork_ranks(lambda _: run_sharded(base, train, folder / name, 3))

    def apart(name: str) -> list[int]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return fork_ranks(lambda _: run_apart(base, train, folder / name))

    codes = {
        "alone": scenario("alone", 1, 6),
        "together": scenario("together", 2, 3),
        "killed": scenario("killed", 2, 3, KILLED_AT),
        "resumed": scenario("killed", 2, 3),
        "sharded": sharded("sharded"),
        "apart": apart("apart"),
    }
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
