"""A tiny contrastive batch, its gradients by the plain loss and by GradCache, alone or as one of two processes.

    RANK=0 WORLD_SIZE=2 python -m tests.losses.cached_job FOLDER

writes what the process found to FOLDER/RANK.json. Of the five queries rank 0 has three, of the ten passages six.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llara.losses.cached import GradCache, gather_rows, own_gradient
from llara.losses.contrast import InfoNCE
from llara.losses.rows import row_gradients
from llara.model import EmbeddingModel
from llara.training.lora import add_lora
from tests import tiny
from tests.training.helpers import finetune_config

QUERIES = 5
LENGTHS = (4, 6, 3, 9, 5, 12, 7, 11, 5, 8, 8, 13, 6, 4, 10)  # of the queries, then of the passages
POSITIVES = torch.tensor([0, 2, 5, 6, 8])
CPU = torch.device("cpu")
DROPOUT = 0.3
Encode = Callable[[list[int]], Tensor]


def make_model(dtype: torch.dtype, *, lora: bool, dropout: float) -> EmbeddingModel:
    """A tiny model in training mode, with dropout in its attention and, where it has it, in LoRA."""
    torch.manual_seed(3)
    model = tiny.model(attention_dropout=dropout)
    if lora:
        config = finetune_config(Path("b"), Path("t"), Path("o"), lora_rank=2, lora_dropout=dropout)
        add_lora(model, config)
        with torch.no_grad():  # its second factor starts at zero, and the first would have no gradient
            for name, value in model.lm.named_parameters():
                if "lora_B" in name:
                    value.normal_(0.0, 0.2)
    model.lm.to(dtype).train()
    return model


def token_rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def chunks_of(size: int) -> list[list[int]]:
    """The numbers of the rows, `size` at a time, the longest first."""
    numbers = sorted(range(len(LENGTHS)), key=lambda number: -LENGTHS[number])
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def trained(model: EmbeddingModel) -> list[Tensor]:
    return [value for value in model.lm.parameters() if value.requires_grad]


def encoder(model: EmbeddingModel, rows: list[list[int]]) -> Encode:
    def encode(chunk: list[int]) -> Tensor:
        ids, lengths = model.pad([rows[number] for number in chunk])
        states = model.trunk(input_ids=ids, attention_mask=None)
        ends = states[torch.arange(len(chunk)), lengths - 1]
        return torch.nn.functional.normalize(ends, dim=-1)

    return encode


def gradients(model: EmbeddingModel) -> Tensor:
    found = [torch.zeros_like(value) if value.grad is None else value.grad for value in trained(model)]
    return torch.cat([value.flatten() for value in found]).clone()


def plain_gradients(
    model: EmbeddingModel, rows: list[list[int]], chunks: list[list[int]], temperature: float
) -> tuple[float, Tensor]:
    """All chunks with their graphs, and one backward pass."""
    torch.manual_seed(11)
    model.lm.zero_grad()
    encode = encoder(model, rows)
    order = torch.tensor([number for chunk in chunks for number in chunk])
    vectors = torch.cat([encode(chunk) for chunk in chunks])[torch.argsort(order)]
    loss = InfoNCE(POSITIVES, temperature)(vectors[:QUERIES], vectors[QUERIES:], slice(0, QUERIES))
    loss.backward()
    return float(loss.detach()), gradients(model)


def cached_gradients(
    model: EmbeddingModel, rows: list[list[int]], chunks: list[list[int]], temperature: float, keep: int = 0
) -> tuple[float, Tensor]:
    torch.manual_seed(11)
    model.lm.zero_grad()
    cache = GradCache(encoder(model, rows), chunks, [torch.tensor(chunk) for chunk in chunks], CPU, keep)
    vectors = cache.vectors()
    queries, passages = vectors[:QUERIES], vectors[QUERIES:]
    sums, *found = row_gradients([InfoNCE(POSITIVES, temperature)], [1.0], queries, passages, cells=20)
    for number in range(len(chunks)):
        cache.surrogate(number, torch.cat(found)).backward()
    return float(sums[0]), gradients(model)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Encoder(nn.Module):
    """What DistributedDataParallel wraps: its forward pass is one chunk's surrogate."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.lm = model.lm

    def forward(self, cache: GradCache[list[int]], number: int, gradient: Tensor) -> Tensor:
        return cache.surrogate(number, gradient)


def rows_of(rank: int) -> tuple[list[int], list[list[int]]]:
    """The numbers of a rank's rows, its queries first, and its chunks of them; the last chunk of rank 0 is not full."""
    queries = [0, 1, 2] if rank == 0 else [3, 4]
    passages = list(range(QUERIES, QUERIES + 6)) if rank == 0 else list(range(QUERIES + 6, len(LENGTHS)))
    numbers, size = [*queries, *passages], 4 if rank == 0 else 1
    return numbers, [numbers[start : start + size] for start in range(0, len(numbers), size)]


def seed_of(rank: int) -> int:
    """What decides which units a rank drops."""
    return 20 + rank


def plain_gradients_of_two(model: EmbeddingModel, rows: list[list[int]], temperature: float) -> tuple[float, Tensor]:
    """All chunks of both ranks with their graphs, each rank's under its own seed, and one backward pass."""
    model.lm.zero_grad()
    encode = encoder(model, rows)
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    for rank in (0, 1):
        torch.manual_seed(seed_of(rank))
        numbers, chunks = rows_of(rank)
        for number, vector in zip(numbers, torch.cat([encode(chunk) for chunk in chunks]), strict=True):
            vectors[number] = vector
    found = torch.stack(vectors)
    loss = InfoNCE(POSITIVES, temperature)(found[:QUERIES], found[QUERIES:], slice(0, QUERIES))
    loss.backward()
    return float(loss.detach()), gradients(model)


def one_of_two(rank: int) -> dict[str, Any]:
    """Encodes this rank's rows, with dropout, and gives the gradients summed over both ranks."""
    model, rows = make_model(torch.float64, lora=True, dropout=DROPOUT), token_rows()
    numbers, chunks = rows_of(rank)
    queries = [number for number in numbers if number < QUERIES]
    passages = numbers[len(queries) :]
    module = DistributedDataParallel(Encoder(model))
    places = [torch.tensor([numbers.index(number) for number in chunk]) for chunk in chunks]
    torch.manual_seed(seed_of(rank))
    cache = GradCache(encoder(model, rows), chunks, places, CPU, keep=1)
    vectors = cache.vectors()
    everything, start = gather_rows(vectors[len(queries) :])
    loss = InfoNCE(POSITIVES[queries], 0.05)
    sums, on_queries, on_all = row_gradients([loss], [1.0], vectors[: len(queries)], everything, cells=20)
    on_own = own_gradient(on_all, start, len(passages))
    gradient = torch.cat([on_queries, on_own])
    for number in range(len(chunks) - 1):
        with module.no_sync():
            module(cache, number, gradient).backward()
    alone = gradients(model)
    module(cache, len(chunks) - 1, gradient).backward()

    odd, _ = gather_rows(torch.tensor([[rank, n] for n in range(3 - 2 * rank)]))
    return {
        "loss": float(sums[0]),
        "gradient": (gradients(model) * 2).tolist(),  # what DistributedDataParallel averaged over two
        "passages": len(passages),
        "chunks": len(chunks),
        "starts": start,
        "gathered": odd.tolist(),
        "alone": alone.tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    answer = one_of_two(rank)
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(answer))
