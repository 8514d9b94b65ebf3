"""What a run may do to a model's layers before it trains them: keep fewer of their activations, or compile them."""

import warnings
from typing import Any

import torch
from torch import nn

from llara.config import TrainConfig
from llara.errors import ConfigError, ModelError
from llara.loading import first_line
from llara.onednn import leave_onednn
from llara.training.sharding import layer_names


def prepare_layers(module: nn.Module, config: TrainConfig) -> None:
    """Sets up the layers of a model as the configuration asks, in place.

    Neither setting changes what is learned: recomputed activations are the same ones, and compiled layers differ by
    rounding alone.

    Args:
        module: What is trained; its transformers model is its attribute `lm`.
        config: Asks for `gradient_checkpointing`, `compile`, both or neither.

    Raises:
        ModelError: The model cannot recompute its activations, or names no layers to compile.
        ConfigError: This machine cannot compile.
    """
    if config.gradient_checkpointing:
        recompute_activations(module.lm, config.model)
    if config.compile:
        check_compiler(config)
        compile_layers(module, config.model)


def recompute_activations(lm: Any, name: str) -> None:
    """Keeps one activation per layer and computes the others again in the backward pass."""
    try:
        with warnings.catch_warnings():
            # transformers asks itself for something by its former name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            newer = getattr(lm, "activation_checkpointing_enable", None)
            (newer or lm.gradient_checkpointing_enable)({"use_reentrant": False})
    except (ValueError, NotImplementedError) as error:
        raise ModelError(
            f"{name}: cannot compute activations again ({first_line(error)}); leave out --gradient-checkpointing"
        ) from error


def compile_layers(module: nn.Module, name: str) -> None:
    """Compiles each layer on first use, for rows of any number and length.

    Layer by layer, because layers of one kind share what is compiled: a sixth of the time that a small model of six
    layers takes as a whole, for the same speed.
    """
    names = set(layer_names(module))
    layers = [part for part in module.modules() if type(part).__name__ in names]
    if not layers:
        raise ModelError(f"{name}: does not say what its layers are, so they cannot be compiled; leave out --compile")
    leave_onednn(module)
    for layer in layers:
        layer.compile(dynamic=True)


def release_layers(module: nn.Module) -> None:
    """Puts compiled layers back as they were: what is left to do after training is not worth compiling for."""
    for part in module.modules():
        part._compiled_call_impl = None


def check_compiler(config: TrainConfig) -> None:
    """Compiles a function of one line.

    Raises:
        ConfigError: That fails, for want of a C++ compiler or of Triton as a rule.
    """
    device = "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"
    try:
        torch.compile(_one_line)(torch.ones(2, device=device))
    except Exception as error:  # whatever the compiler's parts may raise
        raise ConfigError(
            f"--compile: torch cannot compile here ({first_line(error)}); on a CPU it needs g++, on a GPU Triton"
        ) from error


def _one_line(values: torch.Tensor) -> torch.Tensor:
    return values * 2 + 1
