"""Trains in two processes that each hold half of every weight (FSDP2, gloo), and leaves what came of it in a folder.

    python -m tests.training.shards BASE CORPUS FOLDER

accelerate shards on GPUs alone, so the sharding itself is done here, and the trainer finds it done.
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
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llara.config import AdaptConfig
from llara.model import EmbeddingModel
from llara.training import adapt as adapt_module
from llara.training import trainer as trainer_module
from llara.training.adapt import adapt
from llara.training.objective import AdaptModule
from llara.training.parallel import join
from llara.training.sharding import is_sharded, layer_names, trained_weights
from llara.training.trainer import JobTrainer
from tests import tiny
from tests.training.helpers import adapt_config
from tests.training.processes import fork_ranks
from tests.training.rows import PLAN, Rows, Spoilt, prompts_of

RUN: dict[str, Any] = {"steps": 4, "batch_size": 3, "save_every": 2, "log_every": 2, "token_budget": 60}


def shard(module: nn.Module) -> None:
    """Shards a module as accelerate does: each of its layers, then what is left."""
    names = layer_names(module)
    for part in list(module.modules()):
        if type(part).__name__ in names:
            fully_shard(part)
    fully_shard(module)
    module._is_accelerate_prepared = True  # so that accelerate puts no DDP around it


def make_module(model: EmbeddingModel) -> AdaptModule:
    return Spoilt(model, prompts_of(model), PLAN)


def one_step(folder: Path, family: str, changes: dict[str, Any]) -> None:
    """Compares loss and gradients of one step with those of a module that is whole."""
    ranks = join(adapt_config(Path("b"), Path("c"), folder / "out"))
    source = Rows(prompts_of(tiny.model(family, **changes)), 4, {}, 100, None)
    batches = [source.passes(number)[0] for number in (0, 1)]
    counts = batches[0]["counts"] + batches[1]["counts"]
    whole, sharded = (make_module(tiny.model(family, **changes)) for _ in range(2))
    shard(sharded)
    assert any(isinstance(value, DTensor) for value in sharded.parameters())
    expected = sum(whole(batch, counts)[0] for batch in batches)
    expected.backward()
    loss, _ = sharded(batches[ranks.rank], counts)
    (loss * 2).backward()  # gradients are averaged over the processes
    together = sum(ranks.gather(float(loss.detach())))
    worst = 0.0
    for (name, left), right in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert left.grad is not None, name
        worst = max(worst, float((left.grad.full_tensor() - right.grad).norm() / right.grad.norm().clamp(min=1e-6)))
    weights = trained_weights(sharded, keep=ranks.first)
    same = all(torch.equal(weights[name], value.detach()) for name, value in whole.named_parameters() if weights)
    said = {"loss": together, "expected": float(expected.detach()), "worst": worst, "weights": len(weights)}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps({**said, "same": same}))


def run(config: AdaptConfig, sharded: bool, killed: int | None = None) -> None:
    """Adapts, with the trainer finding its module sharded; `killed` is a step in which one process dies."""

    class Trainer(JobTrainer):
        def __init__(self, module: Any, *args: Any) -> None:
            if sharded:
                shard(module)
            super().__init__(module, *args)

        def training_step(self, *args: Any) -> Any:
            if self.state.global_step == killed and self.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            assert is_sharded(self.module) == sharded
            return super().training_step(*args)

    adapt_module.JobTrainer = Trainer  # type: ignore[misc]
    trainer_module.shards = lambda: sharded
    adapt(config)


def main() -> None:
    torch.set_num_threads(1)
    base, corpus, folder = map(Path, sys.argv[1:4])

    def scenario(name: str, job: Callable[[Path], None]) -> list[int]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return fork_ranks(lambda _: job(folder / name))

    def config(where: Path, **changes: Any) -> AdaptConfig:
        return adapt_config(base, corpus, where / "model", **{**RUN, **changes})

    lora = {"lora_rank": 2, "lora_dropout": 0.0}
    codes = {
        "llama": scenario("llama", lambda where: one_step(where, "llama", {})),
        "tied": scenario("tied", lambda where: one_step(where, "llama", {"tie_word_embeddings": True})),
        "gpt2": scenario("gpt2", lambda where: one_step(where, "gpt2", {})),
        "whole": scenario("whole", lambda where: run(config(where), False)),
        "sharded": scenario("sharded", lambda where: run(config(where), True)),
        "killed": scenario("resumed", lambda where: run(config(where), True, killed=3)),
        "resumed": scenario("resumed", lambda where: run(config(where), True)),
        "lora": scenario("lora", lambda where: run(config(where, **lora), False)),
        "lora-sharded": scenario("lora-sharded", lambda where: run(config(where, **lora), True)),
    }
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
