"""The slow, obvious twins of batching."""

from collections.abc import Sequence

import numpy as np


def budget_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Takes the longest row left, and rows after it while the padded batch stays within the budget."""
    left = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = []
    while left:
        batch = [left.pop(0)]
        while left and (len(batch) + 1) * max(lengths[batch[0]], 1) <= token_budget:
            batch.append(left.pop(0))
        batches.append(batch)
    return batches


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Counts the padding cell by cell."""
    padding = total = 0
    for batch in batches:
        width = max(lengths[row] for row in batch)
        total += width * len(batch)
        padding += sum(width - lengths[row] for row in batch)
    return padding / total


def stream(count: int, length: int, seed: int) -> list[int]:
    """The first rows of the endless stream, pass after pass."""
    rows: list[int] = []
    number = 0
    while len(rows) < length:
        rows.extend(np.random.default_rng([seed, number]).permutation(count).tolist())
        number += 1
    return rows[:length]
