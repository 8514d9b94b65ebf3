"""LoRA on any decoder, with the rows of new tokens trained, and a merge that cannot silently do nothing."""

import warnings
from typing import Any

import torch

from llara.config import TrainConfig
from llara.errors import ConfigError, ModelError
from llara.model import EmbeddingModel


def add_lora(model: EmbeddingModel, config: TrainConfig) -> Any:
    """Injects LoRA layers into the model, in place, and returns the PEFT model that can merge them.

    All other weights are frozen, but for the embeddings of tokens that were added at load: they start random.

    Raises:
        ConfigError: `lora_modules` names a layer that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

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
        ModelError: Merging changed no weight, so the result would be the base model.
    """
    changed = any(
        bool((module.lora_B[name].weight != 0).any())
        for module in peft_model.modules()
        if hasattr(module, "lora_B")
        for name in module.lora_B
    )
    if not changed:
        raise ModelError("every LoRA update is zero: the merged model would equal the base model")
    before = {name: value.detach().clone() for name, value in _base_weights(peft_model)}
    model.lm = peft_model.merge_and_unload()
    after = dict(model.lm.named_parameters())
    if all(torch.equal(after[name], value) for name, value in before.items() if name in after):
        raise ModelError("merging LoRA changed no weight: the update is too small for the weights' dtype")


def _base_weights(peft_model: Any) -> list[tuple[str, torch.Tensor]]:
    """Returns the weights under LoRA layers by the names they have once the layers are gone."""
    prefix = "base_model.model."
    return [
        (name.removeprefix(prefix).replace(".base_layer", ""), value)
        for name, value in peft_model.named_parameters()
        if ".base_layer.weight" in name
    ]
