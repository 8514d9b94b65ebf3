"""Stage 2, fine-tuning: contrastive learning on queries, relevant passages and hard negatives.

Shapes: Q queries of a batch, P passages (each query's positive, then its hard negatives), D dimensions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llara.batching import budget_batches, shuffled_positions
from llara.config import FinetuneConfig
from llara.contract import Contract
from llara.data import read_examples
from llara.errors import DataError
from llara.loading import load_model
from llara.losses.contrast import info_nce
from llara.model import TOKEN_BUDGET, EmbeddingModel
from llara.parity import check_padding
from llara.progress import note
from llara.records import Example, Passage
from llara.training.arguments import check_integrations, precision, steps_for
from llara.training.chunks import fingerprint
from llara.training.lora import add_lora, merge_lora
from llara.training.parallel import require_one_process
from llara.training.trainer import Batch, JobTrainer, TrainModule
from llara.training.workspace import TrainResult, Workspace, finished, identity_of


def finetune(config: FinetuneConfig) -> TrainResult:
    """Trains a model so that a query's vector lies near those of its relevant passages.

    Args:
        config: See `FinetuneConfig`.

    Returns:
        The model folder, at `config.output`.

    Raises:
        ConfigError: Settings that contradict the model or leave no room for text.
        DataError: A row of the training data that does not fit; found before the first step.
        ModelError: A model that cannot be loaded.
        StorageError: The output belongs to another configuration, or the disk is full.
    """
    require_one_process("finetune")
    check_integrations(config.report_to)
    torch.manual_seed(config.seed)
    model = load_model(config, for_training=True, new_template=True)
    base = model.fingerprint
    model.contract = training_contract(model.contract, config)
    model.check_lengths()
    identity = identity_of(
        config,
        "finetune",
        base,
        model.contract,
        {"train": fingerprint(config.train)},
        precision(config, next(model.lm.parameters())),
    )
    earlier = finished(config, identity)
    if earlier is not None:
        return earlier
    examples = read_examples(config.train, config.split)
    if not examples:
        raise DataError(", ".join(map(str, config.train)), None, "holds no training example")
    check_padding(model, model.bind(), model.contract.passage_length)
    with Workspace(config, identity) as work:
        source = ExampleBatches(examples, model, config)
        peft_model = add_lora(model, config) if config.lora_rank else None
        freeze_head(model)
        steps = steps_for(config, config.epochs * len(examples) / config.batch_size)
        note(f"{len(examples):,} examples, {steps:,} steps of {config.batch_size * config.accumulation} queries")
        trainer = JobTrainer(FinetuneModule(model, config), source, config, work.folder, steps, "finetune")
        log = trainer.run()
        if peft_model is not None:
            merge_lora(model, peft_model)
        return work.publish(model, steps, log)


def training_contract(contract: Contract, config: FinetuneConfig) -> Contract:
    """Returns the contract of the model that this run makes: its lengths, and whether titles are joined."""
    separator = (contract.title_separator or " ") if config.titles else None
    return replace(contract.with_lengths(config.query_length, config.passage_length), title_separator=separator)


def freeze_head(model: EmbeddingModel) -> None:
    """Freezes an LM head that is not tied to the embeddings: no gradient reaches it."""
    head, embeddings = model.lm.get_output_embeddings(), model.lm.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        head.requires_grad_(False)


class ExampleBatches:
    """Batches of examples drawn at random, as a function of their number: an endless stream of shuffled passes."""

    names: tuple[str, ...] = ("contrast",)
    batches: int | None = None

    def __init__(self, examples: Sequence[Example], model: EmbeddingModel, config: FinetuneConfig) -> None:
        self.examples, self.config, self.contract = examples, config, model.contract
        self.template = model.bind()
        self._budget = config.token_budget or TOKEN_BUDGET.get(model.device.type, 16384)

    def passes(self, number: int) -> list[Batch]:
        """See `Source.passes`: one pass, which cuts itself, since every query is compared with every passage."""
        return [self.batch(number)]

    def empty(self) -> Batch:
        """See `Source.empty`: the stream has no end."""
        raise AssertionError("a stream without end is never short of a batch")

    def describe(self, number: int) -> list[str]:
        """Returns the batch's queries: training pairs have no ids."""
        return [example.query for example in self._examples(number)]

    def batch(self, number: int) -> Batch:
        """Returns token id rows (queries, then passages), slots per row, `positives` int64 [Q], `excluded` bool [Q, P].

        A passage with the text of one of a query's positives is never its negative.
        """
        config, examples = self.config, self._examples(number)
        rng = np.random.default_rng([config.seed, number, 2])
        queries: list[str] = []
        passages: list[str] = []
        positives: list[int] = []
        for example in examples:
            queries.append(example.query)
            positives.append(len(passages))
            passages.append(self._text(example.positives[int(rng.integers(len(example.positives)))]))
            count = min(config.negatives, len(example.negatives))
            if count:
                picked = rng.choice(len(example.negatives), size=count, replace=False)
                passages.extend(self._text(example.negatives[int(i)]) for i in picked)
        relevant = [{self._text(passage) for passage in example.positives} for example in examples]
        # A query that stands twice in a batch must not push away its other copy's positive either.
        same_query: dict[str, set[str]] = {}
        for query, texts in zip(queries, relevant, strict=True):
            same_query.setdefault(query, set()).update(texts)
        excluded = [[text in same_query[query] for text in passages] for query in queries]
        sides = (self.template.query, self.template.passage)
        token_rows = [
            *self.template.encode(queries, "query", self.contract.query_length),
            *self.template.encode(passages, "passage", self.contract.passage_length),
        ]
        lengths = [len(row) for row in token_rows]
        cut = budget_batches(lengths, self._budget)
        return {
            "rows": token_rows,
            "slots": [sides[0].slots] * len(queries) + [sides[1].slots] * len(passages),
            "positives": torch.tensor(positives),
            "excluded": torch.tensor(excluded),
            "counts": torch.tensor([len(queries)]),
            "tokens": sum(lengths),
            "cells": sum(len(part) * max(lengths[row] for row in part) for part in cut),
        }

    def _examples(self, number: int) -> list[Example]:
        size = self.config.batch_size
        rows = shuffled_positions(len(self.examples), number * size, (number + 1) * size, self.config.seed)
        return [self.examples[row] for row in rows.tolist()]

    def _text(self, passage: Passage) -> str:
        return self.contract.join_title(passage.title, passage.text)


class FinetuneModule(TrainModule):
    """InfoNCE over the batch's passages; the batch is encoded in length-sorted chunks of a token budget."""

    def __init__(self, model: EmbeddingModel, config: FinetuneConfig) -> None:
        super().__init__()
        self.lm = model.lm
        self._model = [model]  # in a list, so that it is no submodule: its weights are already here as `lm`
        self.temperature, self.token_budget = config.temperature, config.token_budget

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See `TrainModule.forward`. `counts` holds the queries of the whole optimizer step."""
        vectors = self._model[0].embed(batch["rows"], batch["slots"], self.token_budget)
        queries, passages = vectors[: len(batch["positives"])], vectors[len(batch["positives"]) :]
        total = info_nce(queries, passages, batch["positives"], self.temperature, batch["excluded"].nonzero().T)
        return total / counts[0].float(), total.detach()[None]
