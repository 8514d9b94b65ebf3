"""Where adaptation's batches come from: chunks of similar length, cut into forward passes by a token budget."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llara.batching import Indices, Permutation, WindowedBatches, budget_batches
from llara.config import AdaptConfig
from llara.training.chunks import ChunkStore
from llara.training.objective import NAMES, Plan, Prompts, collate
from llara.training.trainer import Batch

# Numbers of the permutations that pick a sample and what is held out: no run has as many passes, which count from 0.
SAMPLE, HELD_OUT = 2**31, 2**31 + 1
HELD_OUT_SHARE = 10  # at most one chunk in ten
DOCUMENTS_AT_ONCE = 1024


class HeldOut(NamedTuple):
    """Chunks that are kept out of training: all those of some documents.

    ranges: int64 [documents, 2], first chunk and the one after the last, sorted.
    measured: int64 [chunks], those of them that are measured.
    """

    ranges: Indices
    measured: Indices

    @property
    def size(self) -> int:
        """How many chunks are kept out."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())

    def chunks_left(self, positions: Indices) -> Indices:
        """Returns the numbers of the chunks at some positions among those that are left, int64 of the same shape."""
        sizes = self.ranges[:, 1] - self.ranges[:, 0]
        before = np.concatenate([[0], np.cumsum(sizes)])
        skipped: Indices = before[np.searchsorted(self.ranges[:, 0] - before[:-1], positions, side="right")]
        return positions + skipped


class ChunkSource:
    """Batches of `batch_size` chunks as a function of their number; see `WindowedBatches` and the trainer's `Source`.

    Its memory does not grow with the corpus.

    Args:
        chunks: The prepared corpus.
        prompts: The template.
        plan: The objective.
        config: Batch size, seed, sample, length of the run.
        token_budget: Tokens of a forward pass, padding included.
        token_weights: float32 [vocabulary], what each token weighs as a target; None: all weigh the same.
    """

    names: tuple[str, ...] = NAMES

    def __init__(
        self,
        chunks: ChunkStore,
        prompts: Prompts,
        plan: Plan,
        config: AdaptConfig,
        token_budget: int,
        token_weights: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.chunks, self.prompts, self.plan = chunks, prompts, plan
        self.token_budget, self.token_weights = token_budget, token_weights
        self._out = hold_out(chunks, config.held_out, config.seed)
        left = len(chunks) - self._out.size
        count = min(left, config.max_chunks or left)
        self._sample = Permutation(left, config.seed, SAMPLE) if count < left else None
        self._windows = WindowedBatches(count, self._lengths, config.batch_size, config.seed)
        self.batches_per_pass = self._windows.per_pass
        self.batches = None if config.steps else max(math.ceil(config.epochs * self.batches_per_pass), 1)

    def rows(self, number: int) -> Indices:
        """Returns the numbers of the chunks in one batch, int64 [at most batch_size]."""
        return self._numbers(self._windows.batch(number))

    def passes(self, number: int) -> list[Batch]:
        """See `Source.passes`: the longest chunks first."""
        return self._collate(self.rows(number))

    def empty(self) -> Batch:
        """See `Source.empty`: the template alone, or where it has no prefix, around one padding token."""
        text = [] if self.prompts.self_side.prefix else [self.prompts.pad_id]
        nothing = self.prompts._replace(special_ids=(self.prompts.pad_id,))  # so that it is no target
        none = np.empty(0, dtype=np.int64)
        return collate([np.array(text, dtype=np.int64)], [none], nothing, self.plan)

    def describe(self, number: int) -> list[str]:
        """See `Source.describe`."""
        return self.chunks.ids(self.rows(number))

    def held_out(self) -> list[Batch]:
        """Returns the forward passes over the chunks that are measured and never trained on; none on a tiny corpus."""
        return self._collate(self._out.measured)

    def _numbers(self, positions: Indices) -> Indices:
        return self._out.chunks_left(positions if self._sample is None else self._sample[positions])

    def _lengths(self, positions: Indices) -> Indices:
        return self.chunks.lengths(self._numbers(positions))

    def _collate(self, rows: Indices) -> list[Batch]:
        suffixes = {"self": len(self.prompts.self_side.suffix), "next": len(self.prompts.next_side.suffix)}
        added = [suffixes[branch] for branch in self.plan.branches]
        overhead = len(self.prompts.self_side.prefix) + (sum(added) if self.plan.shared else max(added, default=0))
        cut = budget_batches(self.chunks.lengths(rows) + overhead, self.token_budget)
        return [self._pass(rows[part]) for part in cut]

    def _pass(self, rows: Indices) -> Batch:
        picked = [self.chunks[row] for row in rows.tolist()]
        texts, next_texts = [chunk.text for chunk in picked], [chunk.next_text for chunk in picked]
        return collate(texts, next_texts, self.prompts, self.plan, self.token_weights)


def hold_out(chunks: ChunkStore, count: int, seed: int) -> HeldOut:
    """Picks whole documents at random until they hold `count` chunks, but never more than a tenth of all chunks.

    Whole documents, because a chunk is the next text of the one before it.
    """
    room = len(chunks) // HELD_OUT_SHARE
    picked: list[tuple[int, int]] = []
    taken = 0
    for first, end in _documents(chunks, seed) if count else ():
        if first < end and taken + end - first <= room:
            picked.append((first, end))
            taken += end - first
        if taken >= min(count, room):
            break
    measured = itertools.chain.from_iterable(range(*each) for each in picked)
    ranges = np.array(sorted(picked), dtype=np.int64).reshape(-1, 2)
    return HeldOut(ranges, np.fromiter(itertools.islice(measured, count), dtype=np.int64))


def _documents(chunks: ChunkStore, seed: int) -> Iterator[tuple[int, int]]:
    """Yields the first chunk of each document and the one after its last, in random order."""
    order = Permutation(chunks.documents, seed, HELD_OUT)
    for start in range(0, chunks.documents, DOCUMENTS_AT_ONCE):
        documents = order[np.arange(start, min(start + DOCUMENTS_AT_ONCE, chunks.documents))]
        yield from map(tuple, chunks.chunks_of(documents).tolist())
