"""Where adaptation's batches come from: chunks of similar length, cut into forward passes by a token budget."""

import math

import numpy as np

from llara.batching import Indices, Permutation, WindowedBatches, budget_batches
from llara.config import AdaptConfig
from llara.training.chunks import ChunkStore
from llara.training.objective import NAMES, Plan, Prompts, collate
from llara.training.trainer import Batch

SAMPLE = 2**31  # number of the permutation that picks a sample: no run has as many passes, which count from 0


class ChunkSource:
    """Batches of `batch_size` chunks as a function of their number; see `WindowedBatches` and the trainer's `Source`.

    Args:
        chunks: The prepared corpus.
        prompts: The template.
        plan: The objective.
        config: Batch size, seed, sample, length of the run.
        token_budget: Tokens of a forward pass, padding included.
    """

    names: tuple[str, ...] = NAMES

    def __init__(
        self, chunks: ChunkStore, prompts: Prompts, plan: Plan, config: AdaptConfig, token_budget: int
    ) -> None:
        self.chunks, self.prompts, self.plan, self.token_budget = chunks, prompts, plan, token_budget
        count = min(len(chunks), config.max_chunks or len(chunks))
        self._sample = Permutation(len(chunks), config.seed, SAMPLE) if count < len(chunks) else None
        self._windows = WindowedBatches(count, self._lengths, config.batch_size, config.seed)
        self.batches_per_pass = self._windows.per_pass
        self.batches = None if config.steps else max(math.ceil(config.epochs * self.batches_per_pass), 1)

    def rows(self, number: int) -> Indices:
        """Returns the numbers of the chunks in one batch, int64 [at most batch_size]."""
        return self._chunk_numbers(self._windows.batch(number))

    def passes(self, number: int) -> list[Batch]:
        """See `Source.passes`: the longest chunks first."""
        return self._collate(self.rows(number))

    def batch(self, number: int) -> Batch:
        """Returns one batch as a single forward pass."""
        return self._pass(self.rows(number))

    def empty(self) -> Batch:
        """See `Source.empty`: the template alone, or where it has no prefix, around one padding token."""
        text = [] if self.prompts.self_side.prefix else [self.prompts.pad_id]
        nothing = self.prompts._replace(special_ids=(self.prompts.pad_id,))  # so that it is no target
        none = np.empty(0, dtype=np.int64)
        return collate([np.array(text, dtype=np.int64)], [none], nothing, self.plan)

    def describe(self, number: int) -> list[str]:
        """See `Source.describe`."""
        return [f"chunk {row}" for row in self.rows(number).tolist()]

    def held_out(self) -> list[Batch]:
        """Returns the forward passes over the chunks that are kept out of training."""
        return []

    def _chunk_numbers(self, positions: Indices) -> Indices:
        return positions if self._sample is None else self._sample[positions]

    def _lengths(self, positions: Indices) -> Indices:
        return self.chunks.lengths[self._chunk_numbers(positions)]

    def _collate(self, rows: Indices) -> list[Batch]:
        suffixes = {"self": len(self.prompts.self_side.suffix), "next": len(self.prompts.next_side.suffix)}
        added = [suffixes[branch] for branch in self.plan.branches]
        overhead = len(self.prompts.self_side.prefix) + (sum(added) if self.plan.shared else max(added, default=0))
        cut = budget_batches(self.chunks.lengths[rows] + overhead, self.token_budget)
        return [self._pass(rows[part]) for part in cut]

    def _pass(self, rows: Indices) -> Batch:
        picked = [self.chunks[row] for row in rows.tolist()]
        return collate([chunk.text for chunk in picked], [chunk.next_text for chunk in picked], self.prompts, self.plan)
