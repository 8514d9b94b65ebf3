"""Which examples of which sets a batch holds: a pure function of the batch's number.

The sets take turns in an endless stream of places, in proportion to `size ** mixing`. The stream is cut into blocks of
about `BLOCK` places; in each a set has as many as keep it in step with its share, give or take one, and their order is
shuffled. So how many places a set had before a block needs no counting, and within a set every pass takes each example
once, in an order of its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llara.batching import Indices, Permutation

BLOCK = 1000  # places whose order is shuffled together
FINEST = 1000  # places over which shares are rounded, at least, so that none is off by more than a thousandth


class Picked(NamedTuple):
    """Some examples of a batch: the number of their set, and their numbers in it, int64 [examples]."""

    set: int
    rows: Indices


class Mixture:
    """Draws batches from several sets of examples.

    Args:
        sizes: Examples per set, 1 or more.
        batch_size: Examples per batch.
        seed: 0 or more.
        weights: How often each set counts; default once.
        mixing: 1 draws every example as often as any other, 0 every set; in between, sets are drawn in proportion to
            `(weight * size) ** mixing` (temperature sampling: Arivazhagan et al. 2019, arXiv 1907.05019, section 3.1).
        homogeneous: Whether all examples of a batch come from one set.
        world: Processes that train together: number `i * world + rank` is of step i. Where batches are homogeneous,
            those of one step are all of one set.

    Attributes:
        per_pass: Batches that hold as many examples as the sets do together, weights counted; not a whole number.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        weights: Sequence[int] | None = None,
        mixing: float = 1.0,
        *,
        homogeneous: bool = True,
        world: int = 1,
    ) -> None:
        self.sizes, self.batch_size, self.seed, self.world = tuple(sizes), batch_size, seed, world
        self.homogeneous = homogeneous
        weighted = [size * weight for size, weight in zip(sizes, weights or [1] * len(sizes), strict=True)]
        self.per_pass = sum(weighted) / batch_size
        # One pass where nothing is rounded: it takes each example as often as it counts.
        exact = not homogeneous and mixing == 1
        places = sum(weighted) if not homogeneous else math.ceil(self.per_pass / world)
        self._places = places_of(weighted, mixing, places if exact else max(places, FINEST))
        self._blocks = max(int(self._places.sum()) // BLOCK, 1)

    def batch(self, number: int) -> list[Picked]:
        """Returns the examples of a batch, `batch_size` in all; an example may stand in a small set's batch twice."""
        first = number * self.batch_size
        if len(self.sizes) == 1:
            return [Picked(0, self._rows(0, np.arange(first, first + self.batch_size)))]
        if not self.homogeneous:
            sets, positions = self._find(np.arange(first, first + self.batch_size))
            return [Picked(each, self._rows(each, positions[sets == each])) for each in sorted(set(sets.tolist()))]
        step, rank = divmod(number, self.world)
        sets, positions = self._find(np.array([step]))
        start = (int(positions[0]) * self.world + rank) * self.batch_size
        return [Picked(int(sets[0]), self._rows(int(sets[0]), np.arange(start, start + self.batch_size)))]

    def _find(self, places: Indices) -> tuple[Indices, Indices]:
        """Returns the set of each place of the stream, and how many places that set had before it."""
        sets, before = np.empty_like(places), np.empty_like(places)
        done = 0
        while done < len(places):
            number = self._block_of(int(places[done]))
            start = self._before(number)
            order, ranks = self._block(number, self._before(number + 1) - start)
            here = places[done:] - int(start.sum())
            here = here[here < len(order)]
            taken = slice(done, done + len(here))
            sets[taken] = order[here]
            before[taken] = start[order[here]] + ranks[here]
            done += len(here)
        return sets, before

    def _before(self, block: int) -> Indices:
        """Returns how many places each set has before a block, int64 [sets]."""
        return self._places * block // self._blocks

    def _block_of(self, place: int) -> int:
        block = place * self._blocks // int(self._places.sum())
        while int(self._before(block + 1).sum()) <= place:
            block += 1
        while int(self._before(block).sum()) > place:
            block -= 1
        return block

    def _block(self, number: int, counts: Indices) -> tuple[Indices, Indices]:
        """Returns the set of each place of a block, and how many places of the same set stand before it there."""
        order = np.repeat(np.arange(len(counts)), counts)
        np.random.default_rng([self.seed, number, 3]).shuffle(order)
        ranks = np.empty_like(order)
        for each, count in enumerate(counts.tolist()):
            ranks[order == each] = np.arange(count)
        return order, ranks

    def _rows(self, number: int, positions: Indices) -> Indices:
        """Returns the rows at positions of a set's own endless stream."""
        size, seed = self.sizes[number], self.seed + number * 2**32
        rows = np.empty_like(positions)
        passes, offsets = np.divmod(positions, size)
        for each in sorted(set(passes.tolist())):
            here = passes == each
            rows[here] = Permutation(size, seed, each)[offsets[here]]
        return rows


def places_of(sizes: Sequence[int], mixing: float, places: int) -> Indices:
    """Returns how many of about `places` each set has, int64 [sets]: in proportion to `size ** mixing`, one at least.

    What is left after rounding down goes to the sets that lost most by it.
    """
    # Through logarithms: sizes to the power of what a user may ask for do not fit a float.
    logs = mixing * np.log(np.asarray(sizes, dtype=np.float64))
    shares = np.exp(logs - logs.max())
    exact = shares / shares.sum() * places
    found = np.floor(exact).astype(np.int64)
    left = np.argsort(found - exact, kind="stable")[: places - int(found.sum())]
    found[left] += 1
    return np.asarray(np.maximum(found, 1), dtype=np.int64)
