"""Pooling against one row and one position at a time."""

import pytest
import torch

from llara.pooling import POOLS, real_tokens
from llara.templates import POOLINGS, Pooling

ENDS = [5, 1, 3]
SLOTS = [2, 1, 3]


def slow(row: list[list[float]], end: int, slots: int, pooling: Pooling) -> list[float]:
    chosen = {"cls": row[:1], "mean": row[:end], "mean_of_slots": row[end - slots : end]}[pooling]
    return [sum(column) / len(chosen) for column in zip(*chosen, strict=True)]


def test_every_pooling_has_its_function() -> None:
    assert set(POOLS) == set(POOLINGS)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooling_equals_its_slow_twin(pooling: Pooling, dtype: torch.dtype) -> None:
    states = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = POOLS[pooling](states, torch.tensor(ENDS), SLOTS)
    rows = zip(states.tolist(), ENDS, SLOTS, strict=True)
    expected = torch.tensor([slow(row, end, slots, pooling) for row, end, slots in rows])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_never_counts_even_where_it_is_no_number(pooling: Pooling) -> None:
    states = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    expected = POOLS[pooling](states, torch.tensor(ENDS), SLOTS)
    states[~real_tokens(torch.tensor(ENDS), 6)] = torch.inf
    assert torch.equal(POOLS[pooling](states.requires_grad_(), torch.tensor(ENDS), SLOTS), expected)
    POOLS[pooling](states, torch.tensor(ENDS), SLOTS).sum().backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None and bool(states.grad.isfinite().all())
