"""The presets say what was published, and train a LLaMA, or an encoder, as they stand."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llara.config import FinetuneConfig
from llara.model import EmbeddingModel
from llara.retriever import Retriever
from llara.training import finetune as finetune_module
from llara.training.finetune import finetune
from tests import tiny_encoder
from tests.training.examples import row
from tests.training.helpers import write_lines

PUBLISHED: dict[str, dict[str, Any]] = {
    "llara": {
        "lora_rank": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "learning_rate": 3e-4,
        "epochs": 1.0,
        "negatives": 15,
        "temperature": 0.01,
        "query_length": 64,
        "passage_length": 160,
    },
    "repllama": {
        "lora_rank": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.1,
        "learning_rate": 1e-4,
        "epochs": 1.0,
        "negatives": 15,
        "temperature": 0.01,
        "query_length": 32,
        "passage_length": 196,
    },
    "encoder": {
        "template": "bge",
        "lora_rank": 0,
        "learning_rate": 1e-5,
        "epochs": 2.0,
        "negatives": 7,
        "temperature": 0.02,
        "query_length": 512,
        "passage_length": 512,
    },
}
MAPS = {
    "llara": {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"},
    "repllama": {"q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"},
}


def preset(root: Path, name: str) -> FinetuneConfig:
    values = tomllib.loads((root / "recipes" / f"{name}_finetune.toml").read_text(encoding="utf-8"))
    values |= {"train": tuple(map(Path, values["train"])), "output": Path(values["output"])}
    return FinetuneConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_says_what_was_published(root: Path, name: str) -> None:
    config = preset(root, name)
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert (config.steps, config.distill, config.margin) == (None, "none", None)


@pytest.mark.parametrize("name", MAPS)
def test_a_preset_trains_a_llama(
    root: Path, base: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted: list[str] = []
    add_lora = finetune_module.add_lora

    def look(model: EmbeddingModel, config: FinetuneConfig) -> Any:
        made = add_lora(model, config)
        names = [key for key, value in model.lm.named_parameters() if value.requires_grad]
        adapted.extend(part for key in names for part in key.split(".") if part.endswith("_proj"))
        return made

    monkeypatch.setattr(finetune_module, "add_lora", look)
    rows = [row(f"why {i}", [f"the sky {i}"], [f"a file {i} {j}" for j in range(16)]) for i in range(4)]
    train = write_lines(tmp_path / "mined.jsonl", rows)
    made = {"model": str(base), "train": (train,), "output": tmp_path / "out", "device": "cpu", "offline": True}
    config = replace(preset(root, name), **made, batch_size=2)
    assert finetune(config).steps == 2
    assert set(adapted) == MAPS[name]
    contract = Retriever.load(str(config.output), device="cpu").model.contract
    assert contract.template.name == ("paper" if name == "llara" else name)
    assert (contract.query_length, contract.passage_length) == (config.query_length, config.passage_length)


def test_the_preset_of_encoders_trains_a_bert(root: Path, tmp_path: Path) -> None:
    base = tiny_encoder.save_encoder(tmp_path / "base", max_position_embeddings=512)
    train = write_lines(tmp_path / "mined.jsonl", [row(f"why {i}", [f"the sky {i}"], ["a file"] * 8) for i in range(4)])
    made = {"model": str(base), "train": (train,), "output": tmp_path / "out", "device": "cpu", "offline": True}
    config = replace(preset(root, "encoder"), **made, batch_size=2)
    assert finetune(config).steps == 4
    contract = Retriever.load(str(config.output), device="cpu").model.contract
    assert (contract.template.name, contract.pooling, contract.causal) == ("bge", "cls", False)
    assert (contract.query_length, contract.passage_length, contract.normalise) == (512, 512, True)
