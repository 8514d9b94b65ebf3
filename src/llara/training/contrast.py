"""The contrastive objective on a batch: encoded in passes of a token budget, compared as a whole (GradCache).

Shapes: Q queries of a batch, P passages (each query's positive, then its hard negatives), n rows of one forward pass, W
their padded width, D dimensions, K candidates of a query, R pairs of a query and a text that is relevant to it.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from llara.batching import Indices, budget_batches
from llara.config import FinetuneConfig
from llara.data.lines import digest
from llara.errors import ConfigError
from llara.losses.cached import GradCache, gather_rows, own_gradient
from llara.losses.contrast import InfoNCE, relevant_pairs
from llara.losses.distill import KLDivergence, MarginMSE
from llara.losses.matryoshka import Matryoshka
from llara.losses.rows import RowLoss, row_gradients
from llara.model import SIDES, TOKEN_BUDGET, EmbeddingModel
from llara.training.examples import Drawn, ExampleDraw
from llara.training.trainer import Batch, TrainModule

AT_ONCE = 256  # texts that are tokenised together: a tokenizer's own notes on them take more room than the tokens
GRAPH_BUDGET = {"cpu": 4096}
"""Tokens whose activations are kept, where the configuration does not say: on a GPU, as many as one pass has."""


class Part(NamedTuple):
    """One term of the loss: what the log calls it, and what it weighs."""

    name: str
    weight: float


def parts_of(config: FinetuneConfig) -> tuple[Part, ...]:
    """Returns the terms of the loss."""
    contrast = [Part("contrast", config.contrast_weight)] if config.contrast_weight else []
    distill = [] if config.distill == "none" else [Part(config.distill, config.distill_weight)]
    return (*contrast, *distill)


def matryoshka_of(config: FinetuneConfig, dim: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Returns all dimensions to train and their weights; the vector as a whole comes first, and weighs 1.

    Raises:
        ConfigError: The model's vectors have no more dimensions than are to be kept.
    """
    high = [each for each in config.matryoshka_dims if each >= dim]
    if high:
        raise ConfigError(
            f"--matryoshka-dims: the model's vectors have {dim} dimensions, so {high[0]} is no part of it"
        )
    weights = config.matryoshka_weights or (1.0,) * len(config.matryoshka_dims)
    return (dim, *config.matryoshka_dims), (1.0, *weights)


class ContrastSource:
    """Batches of examples, each cut into forward passes of rows alike in length; see the trainer's `Source`.

    Args:
        draw: Gives the examples of a batch.
        model: Its tokenizer and contract.
        config: Lengths, prompts, token budget.
    """

    batches: int | None = None

    def __init__(self, draw: ExampleDraw, model: EmbeddingModel, config: FinetuneConfig) -> None:
        self._draw, self._model, self.config = draw, model, config
        self.template, self.contract = model.bind(), model.contract
        self.names = tuple(part.name for part in parts_of(config))
        self._budget = config.token_budget or TOKEN_BUDGET.get(model.device.type, 16384)

    def passes(self, number: int) -> list[Batch]:
        """See `Source.passes`: the longest rows first. Each pass holds

        `ids` int64 [n, W]; `lengths` int64 [n]; `slots`, the slots of each row; `rows` int64 [n], where they stand
        among queries, then passages.

        The first pass also holds what the batch as a whole is compared by: `positives` int64 [Q]; `query_keys` int64
        [Q] and `passage_keys` int64 [P], which stand for texts; `relevant` int64 [R, 2], keys of queries and of texts
        relevant to them; with a teacher, `candidates` int64 [Q, K] and `teacher` float32 [Q, K] (see `Distillation`).
        """
        drawn = self._draw.draw(number)
        passes = self.cut(
            [(each.set, each.query) for each in drawn], [(each.set, text) for each in drawn for text in each.passages]
        )
        passes[0]["counts"] += len(drawn)
        passes[0] |= comparisons(drawn, scored=self.config.distill != "none")
        return passes

    def cut(self, queries: Sequence[tuple[int, str]], passages: Sequence[tuple[int, str]]) -> list[Batch]:
        """Returns the forward passes over queries and passages, given with their sets; see `passes`."""
        texts = {
            "query": [_prompt(self.config.query_prompts, number) + text for number, text in queries],
            "passage": [_prompt(self.config.passage_prompts, number) + text for number, text in passages],
        }
        rows = [
            row
            for side in SIDES
            for start in range(0, len(texts[side]), AT_ONCE)
            for row in self.template.encode(texts[side][start : start + AT_ONCE], side, self.contract.length(side))
        ]
        slots = [self.template.side(side).slots for side in SIDES for _ in texts[side]]
        parts = budget_batches([len(row) for row in rows], self._budget)
        return [self._pass([rows[row] for row in part], [slots[row] for row in part], part) for part in parts]

    def _pass(self, token_rows: list[list[int]], slots: list[int], rows: Indices) -> Batch:
        lengths = np.array([len(row) for row in token_rows], dtype=np.int64)
        ids = np.full((len(token_rows), int(lengths.max())), self._model.pad_id, dtype=np.int64)
        for line, row in zip(ids, token_rows, strict=True):
            line[: len(row)] = row
        return {
            "ids": torch.from_numpy(ids),
            "lengths": torch.from_numpy(lengths),
            "slots": slots,
            "rows": torch.from_numpy(rows),
            "counts": torch.zeros(len(self.names), dtype=torch.int64),
            "tokens": int(lengths.sum()),
            "cells": ids.size,
        }

    def empty(self) -> Batch:
        """See `Source.empty`: a row of which no vector is taken."""
        row = self.template.wrap([self._model.pad_id], "query", self.template.query.overhead + 1)
        return {**self._pass([row], [self.template.query.slots], np.empty(0, dtype=np.int64)), "tokens": 0, "cells": 0}

    def describe(self, number: int) -> list[str]:
        """Returns the batch's queries: training pairs have no ids."""
        return self._draw.queries(number)


def _prompt(prompts: Sequence[str], number: int) -> str:
    """Returns what stands in front of a text of a set; one prompt is for all sets."""
    return prompts[number] if len(prompts) > 1 else "".join(prompts)


def comparisons(drawn: Sequence[Drawn], *, scored: bool) -> Batch:
    """Returns what a batch is compared by, with a teacher's scores or without; see `ContrastSource.passes`."""
    sizes = [len(each.passages) for each in drawn]
    starts = np.cumsum([0, *sizes[:-1]])
    values: Batch = {
        "positives": torch.from_numpy(starts.astype(np.int64)),
        "query_keys": _keys([each.query for each in drawn]),
        "passage_keys": _keys([text for each in drawn for text in each.passages]),
        "relevant": torch.stack(
            [
                _keys([each.query for each in drawn for _ in each.relevant]),
                _keys([text for each in drawn for text in each.relevant]),
            ],
            dim=1,
        ),
    }
    if scored:
        candidates = np.full((len(drawn), max(sizes)), -1, dtype=np.int64)
        teacher = np.zeros(candidates.shape, dtype=np.float32)
        for row, (each, start, size) in enumerate(zip(drawn, starts, sizes, strict=True)):
            candidates[row, :size] = start + np.arange(size)
            teacher[row, :size] = each.scores
        values |= {"candidates": torch.from_numpy(candidates), "teacher": torch.from_numpy(teacher)}
    return values


def _keys(texts: Sequence[str]) -> Tensor:
    """Returns numbers that stand for texts, int64 [texts]: equal texts, whatever process has them, have equal ones."""
    return torch.tensor([int.from_bytes(digest(text.encode())[:8], "little", signed=True) for text in texts])


class ContrastModule(TrainModule):
    """InfoNCE, distillation and Matryoshka over the vectors of a whole batch, and of the other processes' batches."""

    def __init__(self, model: EmbeddingModel, config: FinetuneConfig) -> None:
        super().__init__()
        self.lm = model.lm
        self._model = [model]  # in a list, so that it is no submodule: its weights are already here as `lm`
        self.settings, self.parts = config, parts_of(config)  # Trainer writes into what it finds as `config`
        self.dims, self.weights = matryoshka_of(config, model.dim)
        default = GRAPH_BUDGET.get(model.device.type, config.token_budget or 16384)
        self._graph_budget = default if config.graph_budget is None else config.graph_budget
        self._cache: GradCache[Batch] | None = None

    def encode(self, batch: Batch) -> Tensor:
        """Returns the vectors of one pass, float32 [n, D]."""
        model = self._model[0]
        states = model.states(batch["ids"], batch["lengths"])
        return model.pool(states, batch["lengths"], batch["slots"])[: len(batch["rows"])]

    def prepare(self, passes: Sequence[Batch], model: nn.Module) -> None:
        """Encodes a whole batch without graph, and keeps the loss's gradient on every vector; see `losses/cached.py`.

        The first passes keep their graph as far as `graph_budget` goes.
        """
        first, device = passes[0], passes[0]["ids"].device
        kept = np.cumsum([batch["cells"] for batch in passes]) <= self._graph_budget

        def encode(batch: Batch) -> Tensor:
            # Through the model as it is wrapped for mixed precision and several processes; see `forward`.
            return cast(Tensor, model(batch, None))

        rows = [batch["rows"] for batch in passes]
        self._cache = GradCache(encode, passes, rows, device, int(kept.sum()), again=self.encode)
        vectors = self._cache.vectors()
        queries, passages = vectors[: len(first["positives"])], vectors[len(first["positives"]) :]
        everything, start = gather_rows(passages)
        weights = [part.weight for part in self.parts]
        self._sums, *found = row_gradients(self.losses(first, start), weights, queries, everything)
        # In the place of the vectors: of many queries, these are what memory is spent on.
        queries.copy_(found[0])
        passages.copy_(own_gradient(found[1], start, len(passages)))
        self._gradient, self._turn = vectors, 0

    def losses(self, batch: Batch, start: int) -> list[RowLoss]:
        """Returns the terms of the loss for the batch whose first pass is given.

        Args:
            batch: See `ContrastSource.passes`.
            start: Where our own passages start among those of all processes.
        """
        config, losses = self.settings, list[RowLoss]()
        if config.contrast_weight:
            relevant, _ = gather_rows(batch["relevant"])
            keys, _ = gather_rows(batch["passage_keys"])
            excluded = relevant_pairs(batch["query_keys"], relevant, keys)
            positives = batch["positives"] + start
            losses.append(InfoNCE(positives, config.temperature, excluded, config.margin, config.relative_margin))
        if config.distill != "none":
            candidates = torch.where(batch["candidates"] < 0, -1, batch["candidates"] + start)
            scores = (candidates, batch["teacher"], config.temperature)
            losses.append(
                KLDivergence(*scores, config.teacher_temperature) if config.distill == "kl" else MarginMSE(*scores)
            )
        if len(self.dims) == 1:
            return losses
        normalise = self._model[0].contract.normalise
        return [Matryoshka(loss, self.dims, self.weights, normalise) for loss in losses]

    def forward(  # type: ignore[override]  # see its second use
        self, batch: Batch, counts: Tensor | None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Returns a pass's loss and sums, as `TrainModule.forward`; of a batch's passes in turn, after `prepare`.

        The loss of a batch is told by its first pass, and the others tell none; its gradient comes from each. Without
        `counts`, the queries of the whole optimizer step, returns the vectors.
        """
        if counts is None:
            return self.encode(batch)
        none = torch.zeros(len(self.parts), device=batch["ids"].device)
        if self._cache is None:  # a pass that counts nothing, to see what it reaches
            return self.encode(batch).sum(), none
        turn, self._turn = self._turn, self._turn + 1
        surrogate = self._cache.surrogate(turn, self._gradient) / counts[0].float()
        sums = none if turn else self._sums
        value = (sums * none.new_tensor([part.weight for part in self.parts])).sum() / counts[0].float()
        return surrogate + (value - surrogate).detach(), sums
