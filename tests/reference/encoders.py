"""The slow, obvious twin of encoders: one text at a time, by transformers alone, as their model cards have it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, T5EncoderModel


def encode(
    folder: Path, texts: list[str], pooling: str, *, length: int, prompt: str = "", normalise: bool = True
) -> torch.Tensor:
    """Returns the vectors of texts, float32 [texts, dim]."""
    words, lm = open_folder(folder)
    return torch.stack([vector(lm, words, prompt + text, pooling, length, normalise) for text in texts])


def open_folder(folder: Path) -> tuple[Any, Any]:
    words = AutoTokenizer.from_pretrained(folder)
    kind = T5EncoderModel if "T5EncoderModel" in (folder / "config.json").read_text() else AutoModel
    return words, kind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def vector(lm: Any, words: Any, text: str, pooling: str, length: int, normalise: bool) -> torch.Tensor:
    row = words(text, truncation=True, max_length=length, return_tensors="pt")
    states = lm(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).last_hidden_state[0]
    found: torch.Tensor = states[0] if pooling == "cls" else states.mean(dim=0)
    return found / found.norm() if normalise else found
