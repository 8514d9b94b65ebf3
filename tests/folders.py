"""Model folders of tiny models, opened and damaged."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from llara.config import ModelConfig
from llara.contract import Contract
from llara.loading import load_model
from llara.model import EmbeddingModel
from tests import tiny

TEXTS = ("The sky is blue.", "Read a file line by line.", "漢字 </s>")


def load(folder: Path | str, **changes: Any) -> EmbeddingModel:
    return load_model(ModelConfig(model=str(folder), **changes))


def save_model(folder: Path) -> Path:
    """A model folder with its contract, whose query length is not the default."""
    tiny.model("llama", contract=Contract(bos=True, query_length=40)).save(folder)
    return folder


def flip(path: Path, name: str, bit: int) -> None:
    """Flips one bit of the first value of a float32 tensor, in place."""
    tensors = load_file(path)
    values = tensors[name].clone()
    bits = values.reshape(-1)[:1].numpy().view(np.uint32)
    bits[0] ^= np.uint32(1 << bit)
    save_file({**tensors, name: values}, path, metadata={"format": "pt"})
