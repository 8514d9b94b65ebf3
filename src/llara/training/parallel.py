"""The processes of one run: who does what only one may do, and how the others learn what came of it.

`torchrun` and `accelerate launch` start them; without either there is one. Rank 0 owns the work folder: it prepares
data, writes checkpoints, and publishes the model, while the others wait. That may take hours, so waiting has a process
group of its own, on the CPU and without the usual timeout; gradients have the device's own.
"""

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from llara.config import TrainConfig
from llara.errors import ConfigError, LlaraError
from llara.loading import pick_device
from llara.progress import set_quiet
from llara.training.arguments import shards

Value = TypeVar("Value")

PATIENCE = timedelta(days=30)


class Ranks(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which owns the work folder."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until every process has come here, however long that takes."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def ask(self, question: Callable[[], Value]) -> Value:
        """Lets rank 0 answer a question, and returns its answer in every process.

        Raises:
            LlaraError: In every process, what rank 0 has raised. Anything else that it raises ends the others, too.
        """
        if self.world == 1:
            return question()
        said: list[Any] = [None, None]
        fault: BaseException | None = None
        if self.first:
            try:
                said[0] = question()
            except BaseException as error:
                fault, said[1] = error, str(error) if isinstance(error, LlaraError) else repr(error)
        dist.broadcast_object_list(said, src=0, group=self.group)
        if fault is not None:
            raise fault
        if said[1] is not None:
            raise LlaraError(said[1])
        answer: Value = said[0]
        return answer

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Lets rank 0 run the block before the others do: it prepares what they then find done."""
        if not self.first:
            self.ask(lambda: None)
            yield
            return
        try:
            yield
        except BaseException as error:
            self.ask(partial(_raise, error))
        self.ask(lambda: None)

    def gather(self, value: Value) -> list[Value]:
        """Returns what every process gave, in the order of their ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found


def join(config: TrainConfig) -> Ranks:
    """Joins the processes that `torchrun` or `accelerate launch` has started, or returns the one that there is.

    All but rank 0 are quiet from here on.

    Raises:
        ConfigError: A device of which several processes cannot each take their own, or a way of sharding that does not
            go here.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = pick_device("auto").type if config.device == "auto" else config.device
    if shards():
        _check_sharding(kind)
    if world == 1:
        return Ranks()
    if config.device.startswith("cuda:"):
        raise ConfigError(f"--device: {config.device} is one device for {world} processes; leave it at auto")
    from accelerate import PartialState

    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {kind} takes one process; start it without torchrun or accelerate launch")
    state = PartialState(cpu=kind == "cpu")
    assert state.num_processes == world, f"{world} processes were started, {state.num_processes} were joined"
    if state.process_index:
        set_quiet(True)
    return Ranks(state.process_index, world, _waiting_group())


def _check_sharding(kind: str) -> None:
    """Refuses what accelerate would pass over in silence, and makes every process load the whole model."""
    if kind != "cuda":
        raise ConfigError(f"accelerate launch --use_fsdp: shards models on GPUs alone, and this job runs on {kind}")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("accelerate launch --use_fsdp: give --fsdp_version 2; version 1 flattens the weights")
    # Otherwise only one process would read the weights, and the others would try the model on random ones.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _raise(error: BaseException) -> None:
    raise error


def _waiting_group() -> Any:
    global _group
    if _group is None:
        _group = dist.new_group(backend="gloo", timeout=PATIENCE)
        atexit.register(leave)
    return _group


_group: Any = None


def leave() -> None:
    """Ends the process groups and their threads; called when the process ends, while Python still runs.

    Gloo's threads let go of what was last exchanged when they come to it, and take the interpreter to do so. One that
    came too late found none and aborted a process whose work was done and published (pytorch/pytorch#179291). A group's
    threads end with the last that holds it: this module, and wrapped models, which hold themselves, too.
    """
    global _group
    _group = None
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def unreached(module: nn.Module, *inputs: Any) -> list[str]:
    """Returns the trained parameters that no gradient reaches; where there are some, ranks must look for them.

    Args:
        module: Returns a loss first.
        inputs: What it takes; random numbers drawn meanwhile are drawn again.
    """
    device = next(module.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        module(*inputs)[0].backward()
    missed = [name for name, value in module.named_parameters() if value.requires_grad and value.grad is None]
    module.zero_grad(set_to_none=True)
    return missed
