"""Sparse vectors as plain arrays: the weighted terms of many texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Terms:
    """The weighted terms of n texts, one text after the other (CSR).

    Within a text the weights fall, and equal ones stand by rising token id. All weights are above 0. A text may have
    none.

    Attributes:
        starts: int64 [n + 1]; the terms of text i are `starts[i]` to `starts[i + 1]`.
        ids: int32 [M], token ids; with folding the one that stands for all variants of its word.
        weights: float32 [M].
    """

    starts: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Returns the token ids and the weights of one text."""
        span = slice(self.starts[number], self.starts[number + 1])
        return self.ids[span], self.weights[span]

    def part(self, start: int, stop: int) -> "Terms":
        """Returns the terms of the texts `start` to `stop` (exclusive)."""
        starts = self.starts[start : stop + 1]
        span = slice(starts[0], starts[-1])
        return Terms(starts - starts[0], self.ids[span], self.weights[span])

    @classmethod
    def join(cls, parts: "Sequence[Terms]") -> "Terms":
        """Puts the texts of several parts one after the other."""
        lengths = [np.empty(0, np.int64), *(np.diff(each.starts) for each in parts)]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        ids = np.concatenate([np.empty(0, np.int32), *(each.ids for each in parts)])
        return cls(starts, ids, np.concatenate([np.empty(0, np.float32), *(each.weights for each in parts)]))

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> "Terms":
        """Joins token ids and weights per text."""
        starts = np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64)
        ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in rows)]).astype(np.int32)
        weights = np.concatenate([np.empty(0, np.float32), *(weights for _, weights in rows)]).astype(np.float32)
        return cls(starts, ids, weights)
