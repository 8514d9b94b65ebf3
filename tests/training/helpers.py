"""Small corpora, training sets and configurations for tiny models."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from llara.config import AdaptConfig, FinetuneConfig
from llara.files import FileRecord, write_json_atomic
from llara.model import EmbeddingModel
from llara.training.watch import VOLATILE

TEXT = "the sky is blue because air scatters short wavelengths of light more than long ones read a file"
WORDS = TEXT.split()


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(str(word) for word in rng.choice(WORDS, size=words))


def write_text(path: Path, documents: int = 12, seed: int = 0) -> Path:
    """A corpus of documents of 8 to 60 words."""
    rng = np.random.default_rng(seed)
    rows = ({"_id": f"d{i}", "text": sentence(rng, int(rng.integers(8, 60)))} for i in range(documents))
    return write_lines(path, rows)


def adapt_config(base: Path, corpus: Path, output: Path, **changes: Any) -> AdaptConfig:
    values: dict[str, Any] = {
        "model": str(base),
        "corpus": (corpus,),
        "output": output,
        "device": "cpu",
        "offline": True,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "chunk_length": 16,
        "min_chunk_length": 4,
        "log_every": 2,
    }
    return AdaptConfig(**(values | changes))


def finetune_config(base: Path, train: Path, output: Path, **changes: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "model": str(base),
        "train": (train,),
        "output": output,
        "device": "cpu",
        "offline": True,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "temperature": 0.05,
        "query_length": 24,
        "passage_length": 32,
        "log_every": 2,
    }
    return FinetuneConfig(**(values | changes))


def fake_publish(model: EmbeddingModel, staged: Path) -> None:
    """What `EmbeddingModel.save` leaves, as far as a workspace looks at it."""
    staged.mkdir(parents=True)
    write_json_atomic(staged / "llara.json", {"dim": model.dim})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def record(path: Path) -> FileRecord:
    raw = path.read_bytes()
    return FileRecord(len(raw), hashlib.sha256(raw).hexdigest())


def computed(folder: Path, name: str = "training_log.jsonl") -> list[dict[str, Any]]:
    """The log without what depends on the machine and the hour: this is equal in a run that was stopped."""
    return [{key: line[key] for key in line if key not in VOLATILE} for line in log_lines(folder, name)]


def log_lines(folder: Path, name: str = "training_log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
