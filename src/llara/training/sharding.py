"""Modules whose weights are sharded over processes (FSDP2): their trained weights and optimizer state as whole tensors.

A checkpoint and a model folder then look the same whether one process made them or many did. Every function here but
`is_sharded` is called by all processes at once. A module that is not sharded passes through them as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Tells whether a module's weights are sharded over processes."""
    return isinstance(module, FSDPModule)


def layer_names(module: nn.Module) -> list[str]:
    """Returns the class names of a model's layers: accelerate shards layer by layer where a module names them."""
    named = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ())}
    present = {type(part).__name__ for part in module.modules()}
    return sorted(named & present)


def open_methods(module: nn.Module, *names: str) -> None:
    """Makes methods gather the weights that they read, as `forward` does by itself."""
    for name in names:
        if is_sharded(module) and hasattr(module, name):
            register_fsdp_forward_method(module, name)


def close(module: nn.Module) -> None:
    """Lets go of weights that a forward pass has gathered, where no backward pass comes that would do so."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(value: Tensor) -> Tensor:
    """Returns a tensor whole, on its device."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained_weights(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Returns the weights that training changes, whole, by name; tied weights once.

    Args:
        module: Sharded or not.
        keep: Whether this process wants them; one that does not helps the others to gather theirs, and gets none.
    """
    found = {}
    for name, value in module.named_parameters():
        if value.requires_grad:
            full = whole(value).detach()
            if keep:
                found[name] = full.cpu() if isinstance(value, DTensor) else full
    return found


@torch.no_grad()
def put_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies whole weights into a module by name; of a sharded one every process takes its part."""
    parameters = dict(module.named_parameters())
    for name, value in weights.items():
        target = parameters[name]
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def optimizer_state(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Returns the state of a sharded module's optimizer, whole, by the names of weights; only in the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(module, optimizer, options=options)


def put_optimizer_state(module: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Gives a sharded module's optimizer the state that `optimizer_state` returned; every process has all of it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
