"""How well a reranker in training orders the documents of held-out queries: loss, nDCG@10 and MRR@10.

A query's documents are its own: those relevant to it, and its hard negatives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from llara.config import FinetuneConfig
from llara.data.store import ExampleSet
from llara.errors import DataError
from llara.losses.listwise import listwise_softmax
from llara.progress import note
from llara.reranker import Reranker
from llara.training.dev import NAMES, note_overlap, ranked, shuffle_queries
from llara.training.examples import passage_text


class _List(NamedTuple):
    """One query's documents among the rows: the relevant ones stand first, and there are others."""

    rows: slice
    relevant: int


class ListMeasure:
    """Measures a reranker on held-out examples.

    Args:
        dev: The held-out sets; queries without a hard negative are passed over.
        model: The reranker that is trained.
        config: How many queries are drawn; the token budget.

    Raises:
        DataError: No query has a hard negative.
    """

    def __init__(self, dev: Sequence[ExampleSet], model: Reranker, config: FinetuneConfig) -> None:
        self._model, self._budget = model, config.token_budget
        self._rows: list[list[int]] = []
        self._lists: list[_List] = []
        encoder = model.bind()
        order, places = shuffle_queries(dev, np.random.default_rng([config.seed, 4]))
        for number, query in order:
            if len(self._lists) == config.dev_queries:
                break
            relevant, others = _documents(dev[number], places[number, query], model)
            if others:
                start = len(self._rows)
                documents = [*relevant, *others]
                self._rows += encoder.rows([query] * len(documents), documents)
                self._lists.append(_List(slice(start, len(self._rows)), len(relevant)))
        if not self._lists:
            reason = "no held-out query has a hard negative, so nothing can be ordered; mine some: llara mine"
            raise DataError(", ".join(each.name for each in dev), None, reason)
        note_overlap(config)
        note(f"measuring on {len(self._lists):,} held-out queries with {len(self._rows):,} documents")

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Returns the mean loss, nDCG@10 and MRR@10. Every process computes all of it."""
        scores = self._model.logits(self._rows, self._budget).float().cpu()
        sums = np.zeros(3)
        for rows, relevant in self._lists:
            own = scores[rows]
            listed = torch.cat([own[:1], own[relevant:]])[None]
            sums[0] += float(listwise_softmax(listed, torch.ones_like(listed, dtype=torch.bool)))
            sums[1:] += ranked(own[None], [range(relevant)])[0]
        return dict(zip(NAMES, (sums / len(self._lists)).tolist(), strict=True))


def _documents(examples: ExampleSet, rows: Sequence[int], model: Reranker) -> tuple[list[str], list[str]]:
    """Returns the texts that are relevant to a query of several rows, and those that are not; each once."""
    same = [examples[row] for row in rows]
    relevant = dict.fromkeys(
        passage_text(examples, each, model.contract) for example in same for each in example.positives
    )
    others = dict.fromkeys(
        passage_text(examples, each, model.contract) for example in same for each in example.negatives
    )
    return list(relevant), [each for each in others if each not in relevant]
