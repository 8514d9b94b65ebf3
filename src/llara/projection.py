"""A linear map from an encoder's pooled state to its vector, as GTR has one: found, and made part of the model.

It is a part of the model called `projection`, so that it is trained, given LoRA, counted and saved like any other.
sentence-transformers keeps it in a folder of its own instead (see `published.py`).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llara.errors import ModelError
from llara.model import PROJECTION

OWN = "linear"  # what sentence-transformers calls it in its own file


def attach_projection(lm: Any, folder: Path, step: Path | None) -> None:
    """Makes the projection that the folder holds a part of the model, in place; where there is none, nothing.

    Args:
        lm: The encoder, in its dtype on its device; on `meta`, shapes alone are read.
        folder: The model folder; one that llara saved has the projection among its weights.
        step: Where sentence-transformers has put it.

    Raises:
        ModelError: It is pickled, cannot be read, or does not fit the encoder.
    """
    found = _read(folder, PROJECTION) if step is None else _read(step, OWN)
    if step is not None and "weight" not in found:
        raise ModelError(
            f"{step}: holds no .safetensors weights with {OWN}.weight; pickled weights are not read. Convert a "
            "pytorch_model.bin where you trust it: load it with torch.load(..., weights_only=True), save it as "
            "model.safetensors with safetensors.torch.save_file"
        )
    if not found:
        return
    states = next(lm.parameters())
    weight, size = found["weight"], int(lm.config.get_text_config().hidden_size)
    if weight.dim() != 2 or weight.shape[1] != size:
        raise ModelError(f"{step or folder}: its projection has the shape {list(weight.shape)}, and states {size}")
    linear = nn.Linear(size, len(weight), bias="bias" in found, device=states.device, dtype=states.dtype)
    if states.device.type != "meta":
        linear.load_state_dict(found)
    setattr(lm, PROJECTION, linear)


def _read(folder: Path, name: str) -> Mapping[str, Tensor]:
    """Returns the tensors of a layer of this name in the safetensors of a folder, by their own names."""
    prefix, found = f"{name}.", dict[str, Tensor]()
    with ExitStack() as stack:
        for path in sorted(folder.glob("*.safetensors")):
            try:
                weights = stack.enter_context(safe_open(path, "pt"))
                names = [key for key in weights.keys() if key.startswith(prefix)]  # noqa: SIM118  it is no mapping
                found |= {key.removeprefix(prefix): weights.get_tensor(key) for key in names}
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: cannot be read: {error}") from error
    return found
