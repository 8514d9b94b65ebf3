"""LoRA on any decoder, with the rows of new tokens trained, and a merge that cannot silently do nothing."""

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from llara.config import TrainConfig
from llara.errors import ConfigError, ModelError
from llara.model import EmbeddingModel


def add_lora(model: EmbeddingModel, config: TrainConfig) -> Any:
    """Injects LoRA layers into the model, in place, and returns the PEFT model that can merge them.

    All other weights are frozen, but for the embeddings of tokens that were added at load: they start random.

    Raises:
        ConfigError: `lora_modules` names a layer that the model does not have.
    """
    modules = list(config.lora_modules)
    targets = "all-linear" if modules == ["all-linear"] else modules
    embedding = next(
        name for name, module in model.lm.named_modules() if module is model.lm.get_input_embeddings()
    ).rpartition(".")[2]
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        trainable_token_indices={embedding: model.new_tokens} if model.new_tokens else None,
    )
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for something by its former name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # GPT-2 keeps its matrices transposed; PEFT finds that out and does it right.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            return get_peft_model(model.lm, settings)
    except ValueError as error:
        raise ConfigError(f"--lora-modules: {str(error).splitlines()[0]}") from error


def merge_lora(model: EmbeddingModel, peft_model: Any) -> None:
    """Adds the LoRA update to the weights and removes its layers, in place.

    Raises:
        ModelError: Merging would change no weight, so the result would be the base model.
    """
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    assert layers, "LoRA was injected"
    if not any(_changes(layer) for layer in layers):
        raise ModelError("merging LoRA changes no weight: its update is zero, or too small for the weights' dtype")
    model.lm = peft_model.merge_and_unload()


@torch.no_grad()
def _changes(layer: Any) -> bool:
    """Tells whether a layer's update, once added, leaves a trace in its weights. One layer's worth of memory."""
    weight = layer.get_base_layer().weight
    return any(
        not torch.equal(weight + layer.get_delta_weight(adapter).to(weight.dtype), weight) for adapter in layer.lora_B
    )
