"""Who does what among the processes of a run; those that take two processes are in test_ranks.py."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from llara.config import AdaptConfig
from llara.errors import ConfigError, LlaraError
from llara.training import parallel
from llara.training.parallel import Ranks, join, unreached
from tests.training.helpers import adapt_config


def config(**changes: str) -> AdaptConfig:
    return adapt_config(Path("b"), Path("c"), Path("o"), **changes)


def test_one_process_is_the_first_and_asks_itself() -> None:
    ranks = join(config())
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert ranks.ask(lambda: 3) == 3
    assert ranks.gather("x") == ["x"]
    ranks.wait()
    with ranks.in_turn():
        pass
    with pytest.raises(LlaraError, match="no room"):
        ranks.ask(lambda: parallel._raise(LlaraError("no room")))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:0", "--device: cuda:0 is one device for 2 processes; leave it at auto"),
        ("mps", "--device: mps takes one process; start it without torchrun"),
    ],
)
def test_several_processes_do_not_share_a_device(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        join(config(device=device))


def test_sharding_that_would_not_happen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ConfigError, match="shards models on GPUs alone, and this job runs on cpu"):
        join(config())
    with pytest.raises(ConfigError, match="give --fsdp_version 2"):
        join(config(device="cuda"))
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert join(config(device="cuda")).world == 1
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false", "every process loads the weights"


def test_weights_that_no_gradient_reaches_are_found_and_nothing_is_left_behind() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.unread, self.frozen = (nn.Linear(2, 2) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.dropout(self.frozen(self.read(values)), 0.5, True).sum(), None

    part = Part()
    before = torch.random.get_rng_state()
    assert unreached(part, torch.ones(1, 2)) == ["unread.weight", "unread.bias"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(value.grad is None for value in part.parameters())
    assert Ranks().group is None
