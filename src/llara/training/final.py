"""The model that a run publishes: with LoRA merged, whole where it was sharded, in full precision where it was not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llara.config import TrainConfig
from llara.hardware import WORKS, probe_torch
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.progress import note
from llara.training.lora import add_lora, merge_lora
from llara.training.opening import Model
from llara.training.parallel import Ranks
from llara.training.sharding import is_sharded, put_weights, trained_weights


def final_model(config: TrainConfig, model: Model, module: nn.Module, peft_model: Any, ranks: Ranks) -> Model:
    """Returns the trained model as it is published; called by all processes, of which the first one gets it.

    Args:
        config: The run's configuration.
        model: What was trained, with LoRA layers where there are some.
        module: The model inside its objective, as the trainer left it.
        peft_model: What `add_lora` returned; None where all weights were trained.
        ranks: This process among those of the run.
    """
    if not is_sharded(module) and config.quantize == "none":
        if peft_model is not None and ranks.first:
            merge_lora(model, peft_model)
        return model
    weights = trained_weights(module, keep=ranks.first)
    assert isinstance(model, EmbeddingModel), "a reranker is trained whole, in each process"
    return rebuild(config, model, weights) if ranks.first else model


def rebuild(config: TrainConfig, model: EmbeddingModel, weights: Mapping[str, Tensor]) -> EmbeddingModel:
    """Returns the base model opened again, whole and in full precision on the CPU, with trained weights in place.

    Merging into weights of 4 bits would round the update to 4 bits; and a sharded model is in no place at once.

    Args:
        config: The run's configuration.
        model: What was trained; its contract is kept.
        weights: The trained weights by their names in the run's module, where the language model is `lm`.
    """
    note(f"{config.model}: opening it again, whole, to put the trained weights in place")
    whole = replace(config, device="cpu", quantize="none", dtype=_dtype(model))
    made = load_model(whole, for_training=True, new_template=True)
    made.contract = model.contract
    peft_model = add_lora(made, whole) if config.lora_rank else None
    holder = nn.Module()
    holder.lm = made.lm
    put_weights(holder, weights)
    if peft_model is not None:
        merge_lora(made, peft_model)
    return made


def _dtype(model: EmbeddingModel) -> Literal["float32", "bfloat16"]:
    """Returns the dtype to merge and save in: that of the run, but float32 where this CPU cannot compute in it."""
    ran = model.lm.get_input_embeddings().weight.dtype
    return "bfloat16" if ran == torch.bfloat16 and probe_torch()[2] == WORKS else "float32"
