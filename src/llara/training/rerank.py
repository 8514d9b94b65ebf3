"""Stage 2 for rerankers: of a query's documents, the relevant one is to score highest (RankLLaMA, section 3.2).

Shapes: L lists of a pass, one per query; K documents of the longest, the relevant one first.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llara.batching import budget_batches
from llara.config import FinetuneConfig
from llara.errors import ConfigError
from llara.losses.listwise import listwise_softmax
from llara.model import TOKEN_BUDGET
from llara.progress import note
from llara.reranker import HEAD, Reranker, load_reranker
from llara.training.arguments import shards, steps_for
from llara.training.contrast import GRAPH_BUDGET
from llara.training.dev_lists import ListMeasure
from llara.training.examples import Drawn, ExampleDraw, check_data, data_identity, open_examples
from llara.training.final import final_model
from llara.training.learnable import check_learnable
from llara.training.lora import add_lora
from llara.training.opening import open_run
from llara.training.selection import run_to_best
from llara.training.trainer import Batch, JobTrainer, TrainModule
from llara.training.workspace import TrainResult, Workspace


def finetune_reranker(config: FinetuneConfig) -> TrainResult:
    """Trains a decoder with a score head so that a query's relevant document scores above its hard negatives.

    Args:
        config: See `FinetuneConfig`; `task` is `rerank`.

    Returns:
        The model folder, at `config.output`.

    Raises:
        ConfigError: Settings that contradict the model or leave no room for text.
        DataError: A row of the training data that does not fit, or no example with a negative, in training or held out;
            found before the first step.
        ModelError: A model that cannot be loaded.
        StorageError: The output belongs to another configuration, or the disk is full.
    """
    check_data(config)
    if shards():
        raise ConfigError("--task: a reranker is trained whole in each process; start it without FSDP")
    opening = open_run(config, "finetune (rerank)", lambda: _load(config), lambda: data_identity(config))
    ranks, model, identity, earlier = opening
    if earlier is not None:
        return earlier
    peft_model = add_lora(model, config) if config.lora_rank else None  # refuses before the examples are read
    with Workspace(config, identity, ranks) as work:
        with ranks.in_turn():
            examples = open_examples(work.folder / "examples", config)
            check_learnable(examples.train, config, model.contract.join_title)
        draw = ExampleDraw(examples.train, examples.weights, config, model.contract, ranks.world)
        steps = steps_for(config, config.epochs * draw.per_pass, ranks.world)
        queries = config.batch_size * config.accumulation * ranks.world
        note(f"{sum(map(len, examples.train)):,} examples, {steps:,} steps of {queries} queries")
        module, source = RerankModule(model, config), PairSource(draw, model, config)
        measure = ListMeasure(examples.dev, model, config) if examples.dev else None
        trainer = JobTrainer(module, source, config, work.folder, steps, "finetune (rerank)", ranks, measure)
        steps, log = run_to_best(trainer, config.patience) if measure else (steps, trainer.run())
        made = final_model(config, model, module, peft_model, ranks)
        getattr(made.lm, HEAD).to(made.lm.get_input_embeddings().weight.dtype)  # beside LoRA it was float32
        return work.publish(made, steps, log)


def _load(config: FinetuneConfig) -> Reranker:
    """Returns the model, with the contract that it is to be saved with."""
    model = load_reranker(config, for_training=True, query_length=config.query_length, length=config.length)
    separator = (model.contract.title_separator or " ") if config.titles else None
    model.contract = replace(model.contract, title_separator=separator)
    return model


class PairSource:
    """Batches of queries with their documents, cut into passes of whole lists; see the trainer's `Source`.

    Args:
        draw: Gives the examples of a batch.
        model: Its tokenizer and contract.
        config: Token budget.
    """

    names: tuple[str, ...] = ("listwise",)
    batches: int | None = None

    def __init__(self, draw: ExampleDraw, model: Reranker, config: FinetuneConfig) -> None:
        self._draw, self._encoder = draw, model.bind()
        self._budget = config.token_budget or TOKEN_BUDGET.get(model.device.type, 16384)
        default = GRAPH_BUDGET.get(model.device.type, self._budget)
        self._graph_budget = default if config.graph_budget is None else config.graph_budget

    def passes(self, number: int) -> list[Batch]:
        """See `Source.passes`. A pass holds `rows`, token ids, and `lists` int64 [L, K], the rows of each query.

        A query without negatives is left out. A list is never cut: `graph_budget` tokens, and one list at least, have
        their activations in memory together.
        """
        drawn = [each for each in map(_without_copies, self._draw.draw(number)) if len(each.passages) > 1]
        lists = [self._encoder.rows([each.query] * len(each.passages), each.passages) for each in drawn]
        passes: list[list[list[list[int]]]] = []
        room = 0
        for rows in lists:
            size = sum(map(len, rows))
            if not passes or size > room:
                passes.append([])
                room = self._graph_budget
            passes[-1].append(rows)
            room -= size
        return [self._pass(part) for part in passes] or [self.empty()]

    def _pass(self, lists: Sequence[Sequence[list[int]]]) -> Batch:
        rows = [row for each in lists for row in each]
        lengths = [len(row) for row in rows]
        cut = budget_batches(lengths, self._budget)
        places = np.full((len(lists), max(map(len, lists))), -1, dtype=np.int64)
        start = 0
        for line, each in zip(places, lists, strict=True):
            line[: len(each)] = np.arange(start, start + len(each))
            start += len(each)
        return {
            "rows": rows,
            "lists": torch.from_numpy(places),
            "counts": torch.tensor([len(lists)]),
            "tokens": sum(lengths),
            "cells": sum(len(part) * max(lengths[row] for row in part) for part in cut),
        }

    def empty(self) -> Batch:
        """See `Source.empty`: a row that is in no list."""
        nothing = torch.empty(0, 1, dtype=torch.int64)
        counts = torch.zeros(1, dtype=torch.int64)
        return {"rows": self._encoder.rows([""], [""]), "lists": nothing, "counts": counts, "tokens": 0, "cells": 0}

    def describe(self, number: int) -> list[str]:
        """Returns the batch's queries: training pairs have no ids."""
        return self._draw.queries(number)


def _without_copies(drawn: Drawn) -> Drawn:
    """Leaves out negatives with the text of a positive: another document of the corpus, or one under another title."""
    first, *others = drawn.passages
    return drawn._replace(passages=(first, *(text for text in others if text not in drawn.relevant)))


class RerankModule(TrainModule):
    """The listwise softmax over each query's documents, in passes of whole lists."""

    def __init__(self, model: Reranker, config: FinetuneConfig) -> None:
        super().__init__()
        self.lm = model.lm
        self._model = [model]  # in a list, so that it is no submodule: its weights are already here as `lm`
        self._budget = config.token_budget

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See `TrainModule.forward`. `counts` holds the lists of the whole optimizer step."""
        scores = self._model[0].logits(batch["rows"], self._budget)
        lists = batch["lists"]
        if not len(lists):
            return scores.sum() * 0.0, scores.new_zeros(1)
        total = listwise_softmax(scores[lists.clamp(min=0)], lists >= 0)
        return total / counts[0].float(), total.detach()[None]
