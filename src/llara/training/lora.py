"""LoRA on any decoder, with the rows of new tokens trained, and a merge that cannot silently do nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from llara.config import TrainConfig
from llara.errors import ConfigError, ModelError
from llara.model import EmbeddingModel
from llara.progress import note
from llara.reranker import HEAD, Reranker
from llara.training.rows import fix_rows, train_rows


def add_lora(model: EmbeddingModel | Reranker, config: TrainConfig) -> Any:
    """Injects LoRA layers into the model, in place, and returns the PEFT model that can merge them.

    All other weights are frozen, but for what starts random: the rows of tokens that were added at load, in the
    embeddings and in the LM head, and a reranker's score head, which is trained whole.

    Raises:
        ConfigError: `lora_modules` names a layer that the model does not have, or one that is tied to another.
        ModelError: The rows of new tokens cannot be trained alone in this model.
    """
    modules = list(config.lora_modules)
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        exclude_modules=[HEAD] if isinstance(model, Reranker) else None,
    )
    tied = _is_tied(model.lm)
    try:
        with _quiet():
            peft_model = get_peft_model(model.lm, settings)
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise ConfigError(
                "--lora-dropout: the experts of this model are no linear layers, and PEFT has no dropout for them; use "
                "--lora-dropout 0, or name the linear layers with --lora-modules, such as q_proj v_proj"
            ) from error
        raise ConfigError(f"--lora-modules: {str(error).splitlines()[0]}") from error
    tables = (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())
    if tied and any(isinstance(table, LoraLayer) for table in tables):
        raise ConfigError(
            "--lora-modules: the LM head and the embeddings of this model share their weights, so that an update of "
            "one would change the other when it is merged; leave them out"
        )
    if model.new_tokens:
        train_rows(model.lm, model.new_tokens)
    if isinstance(model, Reranker):
        # In float32, as PEFT keeps its own weights: small updates vanish in bfloat16.
        getattr(model.lm, HEAD).float().requires_grad_(True)
    return peft_model


def _is_tied(lm: Any) -> bool:
    head = lm.get_output_embeddings()
    return head is not None and head.weight is lm.get_input_embeddings().weight


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks transformers for something by its former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # GPT-2 keeps its matrices transposed; PEFT finds that out and does it right.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        # Experts that are one matrix each: PEFT names their layers as they were before, too.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        # An error here, see above.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


def merge_lora(model: EmbeddingModel | Reranker, peft_model: Any) -> None:
    """Adds the LoRA update and the rows of new tokens to the weights and removes their layers, in place.

    Raises:
        ModelError: The update is zero or lost in rounding, so the result would be the base model; or PEFT did not add
            it.
    """
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    assert layers, "LoRA was injected"
    lost, rows = _look_ahead(layers)
    dtype = str(model.lm.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if not lost <= 0.99:  # nor where it is no number
        raise ModelError(
            "merging LoRA changes no weight, so that the result would be the base model: "
            f"its update is zero, no number, or lost in rounding to {dtype} (then --dtype float32 keeps it)"
        )
    if lost > 0.5:
        note(f"{lost:.0%} of the LoRA update is lost in rounding to {dtype}; --dtype float32 keeps it")
    model.lm = peft_model.merge_and_unload()
    missed = sum(not row.differs() for row in rows)
    if missed:
        raise ModelError(f"merging LoRA has left {missed} of the {len(rows)} layers that it changes as they were")
    fix_rows(model.lm)


class _Row(NamedTuple):
    """The row of a layer's weights that merging changes most, as it was."""

    layer: Any
    number: int
    before: Tensor

    def differs(self) -> bool:
        """Tells whether it has changed since."""
        return not torch.equal(_flat(_base_weight(self.layer))[self.number], self.before)


def _base_weight(layer: Any) -> Tensor:
    # Experts are a parameter of a module that has no `weight`.
    name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    found: Tensor = getattr(layer.get_base_layer(), name)
    return found.detach()


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(0, -2)


@torch.no_grad()
def _look_ahead(layers: list[Any]) -> tuple[float, list[_Row]]:
    """Returns the share of the update, of its norm, that merging loses in rounding: 1 where it leaves no trace at all.

    And of each layer that merging changes a row, to see afterwards whether it did. One layer's worth of memory.
    """
    lost = whole = 0.0
    rows = []
    for layer in layers:
        weight = _base_weight(layer)
        update = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
        merged = weight + update.to(weight.dtype)
        lost += float((merged.float() - weight.float() - update).norm()) ** 2
        whole += float(update.norm()) ** 2
        changes = _flat(merged.float() - weight.float()).norm(dim=-1)
        if changes.any():
            number = int(changes.argmax())
            rows.append(_Row(layer, number, _flat(weight)[number].clone()))
    return float((lost / whole) ** 0.5) if whole else 1.0, rows
