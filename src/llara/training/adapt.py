"""Stage 1, adaptation: EBAE + EBAR on plain text, no labels (Llama2Vec, section 3)."""

from pathlib import Path

import torch

from llara.config import AdaptConfig
from llara.data.lines import check_readable
from llara.errors import ConfigError, DataError, ModelError
from llara.loading import load_model
from llara.model import TOKEN_BUDGET, EmbeddingModel
from llara.parity import check_branches, check_head, check_padding
from llara.progress import note
from llara.templates import BoundTemplate
from llara.training.arguments import steps_for
from llara.training.chunks import ChunkStore, fingerprint
from llara.training.final import final_model
from llara.training.lora import add_lora
from llara.training.objective import BRANCHES, NAMES, AdaptModule, Plan, Prompts
from llara.training.opening import open_run
from llara.training.packing import choose_packing, restore_attention, use_attention
from llara.training.prepare import prepare_chunks
from llara.training.source import ChunkSource
from llara.training.targets import stop_words, target_weights
from llara.training.trainer import JobTrainer, Measure, to_device
from llara.training.workspace import TrainResult, Workspace


def adapt(config: AdaptConfig) -> TrainResult:
    """Trains a causal language model so that its slots say what a text is and what follows it.

    Args:
        config: See `AdaptConfig`.

    Returns:
        The model folder, at `config.output`.

    Raises:
        ConfigError: Settings that contradict the model or leave no room for text.
        DataError: A row of the corpus that does not fit.
        ModelError: A model that cannot be adapted; says why.
        StorageError: The output belongs to another configuration, or the disk is full.
    """
    for path in config.corpus:
        check_readable(path)  # before the model is loaded
    ranks, model, identity, earlier = open_run(
        config, "adapt", lambda: _load(config), lambda: {"corpus": fingerprint(config.corpus)}
    )
    if earlier is not None:
        return earlier
    plan = objective_of(config, model)
    template = model.bind()
    model.check_length(
        config.chunk_length + max(template.query.overhead, template.passage.overhead),
        "--chunk-length with the template",
    )
    plan = ranks.ask(lambda: choose_passes(plan, model, template, config))  # all go one way, however close it is
    peft_model = add_lora(model, config) if config.lora_rank else None  # refuses before the corpus is tokenised
    with Workspace(config, identity, ranks) as work:
        with ranks.in_turn():
            chunks = prepare(work.folder / "chunks", config, model)
        _check_chain(chunks, config)
        module, source = assemble(config, model, plan, chunks)
        steps = steps_for(config, source.batches or 0, ranks.world)
        label, measure = f"adapt ({config.objective})", recall(module, source)
        log = JobTrainer(module, source, config, work.folder, steps, label, ranks, measure).run()
        restore_attention(model.lm)
        return work.publish(final_model(config, model, module, peft_model, ranks), steps, log)


def _load(config: AdaptConfig) -> EmbeddingModel:
    model = load_model(config, for_training=True, new_template=True)
    objective_of(config, model)  # refuses what cannot be adapted before the corpus is read
    return model


def prepare(folder: Path, config: AdaptConfig, model: EmbeddingModel) -> ChunkStore:
    """Cuts the corpus into chunks in `folder`, as the configuration says; see `prepare_chunks`."""
    return prepare_chunks(folder, config, model)


def assemble(
    config: AdaptConfig, model: EmbeddingModel, plan: Plan, chunks: ChunkStore
) -> tuple[AdaptModule, ChunkSource]:
    """Returns what a run trains, and where its batches come from. LoRA is injected before.

    The model runs under the attention that the plan needs from here on; see `restore_attention`.
    """
    use_attention(model.lm, plan)
    template = model.bind()
    prompts = Prompts(template.passage, template.query, model.pad_id, tuple(model.tokenizer.all_special_ids))
    budget = config.token_budget or TOKEN_BUDGET.get(model.device.type, 16384)
    weights = target_weights(config, model.tokenizer, chunks)
    return AdaptModule(model, prompts, plan), ChunkSource(chunks, prompts, plan, config, budget, weights)


def recall(module: AdaptModule, source: ChunkSource) -> Measure | None:
    """Returns what measures the share of the held-out texts' target tokens that each branch's slots name."""
    passes = source.held_out()
    if not passes or not module.plan.branches:
        return None

    def measure() -> dict[str, float]:
        device = next(module.parameters()).device
        found = torch.stack([module.recall(to_device(batch, device)).cpu().double() for batch in passes]).sum(dim=0)
        return {
            f"recall_{name}": float(total / count)
            for name, (total, count) in zip(NAMES[: len(BRANCHES)], found, strict=True)
            if count
        }

    return measure


def objective_of(config: AdaptConfig, model: EmbeddingModel) -> Plan:
    """Returns how the objective runs on this model, in one pass where `choose_passes` finds no fault with that."""
    template = model.contract.template
    if not model.contract.causal:
        raise ModelError(
            f"{config.model}: is an encoder, so it has no causal LM head, which adaptation projects through; adapt a "
            "causal decoder, or train this one with finetune"
        )
    if config.objective != "lm" and not template.branches:
        raise ConfigError(
            f"--template: {template.name!r} has no two branches over one text, which adaptation needs; "
            "use paper, release, or a template whose sides share their prefix"
        )
    if not model.has_head:
        raise ModelError(f"{config.model}: holds no LM head, which adaptation projects through; use the base model")
    if config.targets == "no-stopwords":
        stop_words(config.language)  # an unknown language is said before any work
    scale = template.loss_scale if config.loss_scale is None else config.loss_scale
    return Plan(config.objective, True, scale, config.lm_weight, config.targets != "all")


def choose_passes(plan: Plan, model: EmbeddingModel, template: BoundTemplate, config: AdaptConfig) -> Plan:
    """Returns the plan as this model does it right: branches in one pass or in two, rows packed or not; says so."""
    check_head(model)
    if not plan.shared:
        check_padding(model, template, config.chunk_length)
        return plan
    parity = check_branches(model, template, config.chunk_length)
    if not parity.one_pass:
        note(f"{config.model}: running each branch in a pass of its own: {parity.reason}")
    plan = plan._replace(one_pass=parity.one_pass, form=parity.form)
    return choose_packing(plan, model, template, config)


def _check_chain(chunks: ChunkStore, config: AdaptConfig) -> None:
    """Says how many chunks have a next text: a corpus of short passages has few, and then EBAR learns little."""
    chained = chunks.chained
    note(f"{len(chunks):,} chunks, {chained:,} with a next text")
    if config.objective == "ebar" and not chained:
        raise DataError(
            ", ".join(map(str, config.corpus)),
            None,
            "no text has a next one, so EBAR has no target; lower --chunk-length",
        )
