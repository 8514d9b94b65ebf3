"""Which rows go together: length-sorted windows and token budgets, for training and encoding alike."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def budget_batches(lengths: Sequence[int] | npt.NDArray[np.int64], token_budget: int) -> list[Indices]:
    """Cuts rows into batches of similar length whose padded size stays within a token budget.

    Args:
        lengths: Tokens per row.
        token_budget: Upper bound on rows x longest row of a batch. A row longer than that is a batch by itself.

    Returns:
        Row numbers per batch, longest rows first (so that a lack of memory shows at the start), every row exactly once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(int(sizes[order[start]]), 1)
        stop = start + max(token_budget // longest, 1)
        batches.append(order[start:stop])
        start = stop
    return batches


def padding_share(lengths: Sequence[int] | npt.NDArray[np.int64], batches: Sequence[Indices]) -> float:
    """Returns the share of padding among all tokens of the padded batches, 0 to 1."""
    sizes = np.asarray(lengths, dtype=np.int64)
    padded = sum(len(batch) * int(sizes[batch].max()) for batch in batches)
    return 1.0 - float(sum(int(sizes[batch].sum()) for batch in batches)) / padded if padded else 0.0


class Permutation:
    """A pseudo-random order of the rows 0 to `count` - 1, in memory that does not grow with them.

    `Permutation(count, seed, number)[positions]` gives the rows that stand at these positions; the same three numbers
    always give the same order. An alternating Feistel network with modular addition over a table of `rows` x `columns`
    cells, of which there are few more than `count`; a cell beyond the end is put through again until it is within it
    ("cycle walking"). Both make a bijection of any round function. Source: Black & Rogaway, "Ciphers with Arbitrary
    Finite Domains", CT-RSA 2002, section 4 and 5.
    """

    ROUNDS = 12

    def __init__(self, count: int, seed: int, number: int) -> None:
        self.count = count
        self.columns = max(math.isqrt(max(count - 1, 0)) + 1, 1)
        self.rows = max(-(-count // self.columns), 1)
        self.keys = np.random.SeedSequence([seed, number]).generate_state(self.ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, positions: Indices) -> Indices:
        """Returns the rows at `positions`, int64 of the same shape; IndexError for a position that there is not."""
        found = np.array(positions, dtype=np.int64)
        if found.size and not (found.min() >= 0 and found.max() < self.count):
            raise IndexError(f"positions must be within 0 and {self.count - 1}")
        flat = self._shuffle(found.reshape(-1))
        while (outside := np.flatnonzero(flat >= self.count)).size:
            flat[outside] = self._shuffle(flat[outside])
        return flat.reshape(found.shape)

    def _shuffle(self, cells: Indices) -> Indices:
        row, column = np.divmod(cells, self.columns)
        for number, key in enumerate(self.keys):
            if number % 2:
                column = (column + _mix(row, key, self.columns)) % self.columns
            else:
                row = (row + _mix(column, key, self.rows)) % self.rows
        return np.asarray(row * self.columns + column, dtype=np.int64)


def _mix(values: Indices, key: np.uint64, end: int) -> Indices:
    """Returns numbers below `end` that look random: SplitMix64's finaliser (Steele, Lea & Flood, OOPSLA 2014)."""
    mixed = values.astype(np.uint64) ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(end)).astype(np.int64)


def shuffled_positions(count: int, start: int, stop: int, seed: int) -> Indices:
    """Returns the rows at positions `start` to `stop` of an endless stream of passes over `count` rows.

    Any part of the stream can be recomputed without what came before it, which is what makes a resumed run see the rows
    it would have seen.
    """
    parts = []
    position = start
    while position < stop:
        number, offset = divmod(position, count)
        taken = min(count - offset, stop - position)
        parts.append(Permutation(count, seed, number)[np.arange(offset, offset + taken)])
        position += taken
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class WindowedBatches:
    """Batches of one size and of similar length: a pure function of seed and batch number.

    Each pass over the rows has its own random order. It is cut into windows of `window` batches; a window is sorted by
    length, cut into batches, and its batches are shuffled. So rows of one batch are alike in length, the order stays
    random, and a pass holds every row exactly once (its last batch may be smaller). Only one window is in memory.

    Args:
        count: Rows, 1 or more.
        lengths: Gives the lengths, int64 [n], of rows, int64 [n].
        batch_size: Rows per batch.
        seed: 0 or more.
        window: Batches per window.
    """

    def __init__(
        self, count: int, lengths: Callable[[Indices], Indices], batch_size: int, seed: int, window: int = 16
    ) -> None:
        self.count, self.lengths = count, lengths
        self.batch_size, self.seed, self.window = batch_size, seed, window
        self.per_pass = math.ceil(count / batch_size)
        self._windows_per_pass = math.ceil(self.per_pass / window)
        self._latest: tuple[int, list[Indices]] = (-1, [])

    def batch(self, number: int) -> Indices:
        """Returns the row numbers of one batch, int64 [at most batch_size]. Safe to call from several threads."""
        pass_number, place = divmod(number, self.per_pass)
        window, offset = divmod(place, self.window)
        serial = pass_number * self._windows_per_pass + window
        latest = self._latest
        if serial != latest[0]:
            # One assignment, so that another thread sees the old window or the new one.
            self._latest = latest = (serial, self._cut(pass_number, window, serial))
        return latest[1][offset]

    def _cut(self, pass_number: int, window: int, serial: int) -> list[Indices]:
        span = self.window * self.batch_size
        positions = np.arange(window * span, min((window + 1) * span, self.count))
        rows = Permutation(self.count, self.seed, pass_number)[positions]
        rows = rows[np.argsort(self.lengths(rows), kind="stable")]
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        order = np.random.default_rng([self.seed, serial, 1]).permutation(len(batches))
        return [batches[i] for i in order]
