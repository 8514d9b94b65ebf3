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


def mix(value: int, key: int) -> int:
    """SplitMix64's finaliser, in whole numbers cut to 64 bits."""
    mixed = value ^ key
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return mixed ^ (mixed >> 31)


def permutation(count: int, seed: int, number: int) -> list[int]:
    """One cell after the other, put through the network until it is a row."""
    keys = np.random.SeedSequence([seed, number]).generate_state(12, np.uint64).tolist()
    columns = next(width for width in range(1, count + 1) if width * width >= count)
    rows = -(-count // columns)
    order = []
    for cell in range(count):
        while True:
            row, column = divmod(cell, columns)
            for turn, key in enumerate(keys):
                if turn % 2 == 0:
                    row = (row + mix(column, key) % rows) % rows
                else:
                    column = (column + mix(row, key) % columns) % columns
            cell = row * columns + column
            if cell < count:
                break
        order.append(cell)
    return order


def stream(count: int, length: int, seed: int) -> list[int]:
    """The first rows of the endless stream, pass after pass."""
    rows: list[int] = []
    number = 0
    while len(rows) < length:
        rows.extend(permutation(count, seed, number))
        number += 1
    return rows[:length]


def windowed_batches(lengths: Sequence[int], size: int, seed: int, window: int, number: int) -> list[list[int]]:
    """Every batch of pass `number`."""
    order = permutation(len(lengths), seed, number)
    windows = [order[start : start + window * size] for start in range(0, len(order), window * size)]
    batches: list[list[int]] = []
    for place, rows in enumerate(windows):
        rows = sorted(rows, key=lambda row: lengths[row])
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        shuffled = np.random.default_rng([seed, number * len(windows) + place, 1]).permutation(len(parts))
        batches += [parts[i] for i in shuffled]
    return batches
