"""Which rows go together: length-sorted windows and token budgets, for training and encoding alike."""

import math
from collections.abc import Sequence

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


def permutation(count: int, seed: int, number: int) -> Indices:
    """Returns the order of pass `number` over `count` rows: drawn from seed and number, so it can be drawn again."""
    return np.random.default_rng([seed, number]).permutation(count)


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
        parts.append(permutation(count, seed, number)[offset : offset + taken])
        position += taken
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class WindowedBatches:
    """Batches of one size and of similar length: a pure function of seed and batch number.

    Each pass over the rows has its own random order. It is cut into windows of `window` batches; a window is sorted by
    length, cut into batches, and its batches are shuffled. So rows of one batch are alike in length, the order stays
    random, and a pass holds every row exactly once (its last batch may be smaller).
    """

    def __init__(self, lengths: npt.NDArray[np.int64], batch_size: int, seed: int, window: int = 16) -> None:
        self.lengths, self.batch_size, self.seed, self.window = lengths, batch_size, seed, window
        self.per_pass = math.ceil(len(lengths) / batch_size)
        self._windows_per_pass = math.ceil(self.per_pass / window)
        self._number, self._batches = -1, list[Indices]()
        self._pass_number, self._pass = -1, np.empty(0, dtype=np.int64)

    def batch(self, number: int) -> Indices:
        """Returns the row numbers of one batch, int64 [at most batch_size]."""
        pass_number, place = divmod(number, self.per_pass)
        window, offset = divmod(place, self.window)
        serial = pass_number * self._windows_per_pass + window
        if serial != self._number:
            self._number, self._batches = serial, self._cut(pass_number, window, serial)
        return self._batches[offset]

    def _cut(self, pass_number: int, window: int, serial: int) -> list[Indices]:
        if pass_number != self._pass_number:
            self._pass_number, self._pass = pass_number, permutation(len(self.lengths), self.seed, pass_number)
        span = self.window * self.batch_size
        rows = self._pass[window * span : (window + 1) * span]
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        order = np.random.default_rng([self.seed, serial, 1]).permutation(len(batches))
        return [batches[i] for i in order]
