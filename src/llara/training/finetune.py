"""Stage 2, fine-tuning: contrastive learning on queries, relevant passages and hard negatives."""

from dataclasses import replace
from functools import partial

from llara.config import FinetuneConfig
from llara.contract import Contract
from llara.errors import DataError
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.parity import check_vectors
from llara.progress import note
from llara.training.arguments import steps_for
from llara.training.contrast import ContrastModule, ContrastSource, matryoshka_of
from llara.training.dev import DevMeasure, make_pool, note_overlap
from llara.training.examples import ExampleDraw, Opened, check_data, data_identity, open_examples
from llara.training.final import final_model
from llara.training.learnable import check_learnable
from llara.training.lora import add_lora
from llara.training.opening import open_run
from llara.training.rerank import finetune_reranker
from llara.training.selection import run_to_best
from llara.training.trainer import JobTrainer, Measure
from llara.training.workspace import TrainResult, Workspace


def finetune(config: FinetuneConfig) -> TrainResult:
    """Trains a model so that a query's vector lies near those of its relevant passages.

    With the task `rerank` it trains a reranker, see `finetune_reranker`.

    Args:
        config: See `FinetuneConfig`.

    Returns:
        The model folder, at `config.output`.

    Raises:
        ConfigError: Settings that contradict the model or leave no room for text.
        DataError: A row of the training data that does not fit, or nothing to learn from; found before the first step.
        ModelError: A model that cannot be loaded.
        StorageError: The output belongs to another configuration, or the disk is full.
    """
    if config.task == "rerank":
        return finetune_reranker(config)
    check_data(config)
    ranks, model, identity, earlier = open_run(config, "finetune", lambda: _load(config), lambda: data_identity(config))
    if earlier is not None:
        return earlier
    check_vectors(model, model.bind(), model.contract.passage_length)
    with Workspace(config, identity, ranks) as work:
        with ranks.in_turn():
            examples = open_examples(work.folder / "examples", config)
            check_learnable(examples.train, config, model.contract.join_title, ranks.world)
        draw = ExampleDraw(examples.train, examples.weights, config, model.contract, ranks.world)
        source = ContrastSource(draw, model, config)
        peft_model = add_lora(model, config) if config.lora_rank else None
        freeze_head(model)
        module = ContrastModule(model, config)
        steps = steps_for(config, config.epochs * draw.per_pass, ranks.world)
        queries = config.batch_size * config.accumulation * ranks.world
        note(f"{sum(map(len, examples.train)):,} examples, {steps:,} steps of {queries} queries")
        measure = dev_measure(config, examples, source, module)
        trainer = JobTrainer(module, source, config, work.folder, steps, "finetune", ranks, measure)
        steps, log = run_to_best(trainer, config.patience) if measure else (steps, trainer.run())
        return work.publish(final_model(config, model, module, peft_model, ranks), steps, log)


def dev_measure(
    config: FinetuneConfig, examples: Opened, source: ContrastSource, module: ContrastModule
) -> Measure | None:
    """Returns what measures the model on held-out examples, where there are some."""
    if not examples.dev:
        return None
    pool = make_pool(examples.dev, examples.train, config, source.contract)
    if pool.relevant.shape[1] == len(pool.queries) * len(pool.passages):
        reason = "each passage is relevant to each held-out query, so every step would be the best; add examples"
        raise DataError(", ".join(each.name for each in examples.dev), None, reason)
    note_overlap(config)
    note(f"measuring on {len(pool.queries):,} held-out queries, each against {len(pool.passages):,} passages")
    return partial(DevMeasure(pool, source, config), module)


def _load(config: FinetuneConfig) -> EmbeddingModel:
    """Returns the model, with the contract that it is to be saved with."""
    model = load_model(config, for_training=True, new_template=True)
    model.contract = training_contract(model.contract, config)
    model.check_lengths()
    matryoshka_of(config, model.dim)
    return model


def training_contract(contract: Contract, config: FinetuneConfig) -> Contract:
    """Returns the contract of the model that this run makes: its lengths, and whether titles are joined."""
    separator = (contract.title_separator or " ") if config.titles else None
    return replace(contract.with_lengths(config.query_length, config.passage_length), title_separator=separator)


def freeze_head(model: EmbeddingModel) -> None:
    """Freezes an LM head that is not tied to the embeddings: no gradient reaches it."""
    head, embeddings = model.lm.get_output_embeddings(), model.lm.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        head.requires_grad_(False)
