"""What `test_integrations.py` runs in a process that sees the optional packages: python -m ... NAME FOLDER.

Checks fail as an AssertionError, and so as the exit code of the process.
"""

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llara import loading
from llara.config import AdaptConfig, ModelConfig
from llara.hardware import WORKS, probe_torch
from llara.loading import load_model
from llara.training.adapt import adapt
from llara.training.trainer import JobTrainer
from tests import tiny
from tests.training.helpers import adapt_config, log_lines, weights, write_text

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "7b_qlora_adapt.toml"


def on_the_cpu() -> list[str]:
    """Lets a job in 4 bits run on a CPU, which llara refuses; returns the list that will name the parts of its model.

    There bitsandbytes packs weights for inference alone where the CPU has bfloat16, which is switched off.
    """
    import bitsandbytes

    told, picked, layer = loading._quantization, loading.pick_device, bitsandbytes.nn.modules.Linear4bit
    made, run = layer.__init__, JobTrainer.run

    def quantization(config: ModelConfig) -> dict[str, Any]:
        loading.pick_device = lambda _: torch.device("cuda")  # type: ignore[assignment]
        try:
            return {**told(config), "device_map": {"": "cpu"}}
        finally:
            loading.pick_device = picked

    def without_packing(self: Any, *arguments: Any, **settings: Any) -> None:
        made(self, *arguments, **settings)
        self.support_avx512bf16_for_cpu = False

    parts: list[str] = []

    def looked_at(self: JobTrainer) -> dict[str, float]:
        parts.extend(type(part).__name__ for part in self.module.modules())
        return run(self)

    loading._quantization = quantization
    layer.__init__ = without_packing
    JobTrainer.run = looked_at  # type: ignore[method-assign]
    return parts


def base_of(folder: Path) -> Path:
    return tiny.save_base(folder / "base", hidden_size=64, head_dim=16)


def four_bits(folder: Path) -> None:
    """Training in 4 bits learns, and what is saved is the whole base with the update."""
    parts = on_the_cpu()
    base, corpus = base_of(folder), write_text(folder / "text.jsonl", documents=20)
    settings: dict[str, Any] = {"quantize": "4bit", "dtype": "float32", "lora_rank": 4, "template": "release"}
    config = adapt_config(base, corpus, folder / "out", steps=12, batch_size=8, log_every=4, **settings)
    losses = [line["loss"] for line in log_lines(adapt(config).output)]
    assert "Linear4bit" in parts
    assert losses[-1] < losses[0]
    before, after = weights(base), weights(config.output)
    changed = {name for name in before if "proj" in name and not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    for name in changed:  # near the base, and not near its 4 bits: what was rounded is there again
        assert after[name].dtype == torch.float32
        assert float((after[name] - before[name]).norm() / before[name].norm()) < 0.3
    load_model(ModelConfig(model=str(config.output), device="cpu", verify=True))


def recipe(folder: Path) -> None:
    """The recipe for a model of 7B in 4 bits runs on a tiny one, in its own precision where this CPU can."""
    parts = on_the_cpu()
    values = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    assert values["quantize"] == "4bit"
    if probe_torch()[2] != WORKS:
        values["dtype"] = "float32"
    small = {"batch_size": 4, "steps": 2, "token_budget": 64, "chunk_length": 16, "min_chunk_length": 4}
    corpus = write_text(folder / "text.jsonl")
    paths: dict[str, Any] = {"model": str(base_of(folder)), "corpus": (corpus,), "output": folder / "out"}
    result = adapt(AdaptConfig(**{**values, **small, **paths, "device": "cpu", "offline": True}))
    assert "Linear4bit" in parts
    assert result.steps == 2
    before, after = weights(folder / "base"), weights(result.output)
    changed = {key for key in before if not torch.equal(before[key].float(), after[key].float())}
    assert {key for key in before if "proj" in key} <= changed, "LoRA on all linear maps, merged"


def reported(folder: Path, name: str) -> list[dict[str, Any]]:
    """Adapts a tiny model, reporting to an integration; returns the lines of its log."""
    base, corpus = tiny.save_base(folder / "base"), write_text(folder / "text.jsonl", documents=20)
    config = adapt_config(base, corpus, folder / "out", steps=4, log_every=2, report_to=(name,))
    return log_lines(adapt(config).output)


def wandb(folder: Path) -> None:
    """Weights & Biases gets every value of the log, and writes it here: the job is offline."""
    last = reported(folder, "wandb")[-1]
    import wandb

    assert wandb.run is not None
    assert wandb.run.settings.mode == "offline"
    shown = dict(wandb.run.summary)
    del last["step"]
    assert {name: shown[f"train/{name}"] for name in last} == last
    wandb.finish()
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


def trackio(folder: Path) -> None:
    """Trackio gets every value of the log, in its own database here."""
    last = reported(folder, "trackio")[-1]
    from trackio.api import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("huggingface")
    rows = SQLiteStorage.get_logs("huggingface", run.name)
    (shown,) = [row for row in rows if row.get("train/loss") == last["loss"]]
    del last["step"]
    assert {name: shown[f"train/{name}"] for name in last} == last


if __name__ == "__main__":
    checks: dict[str, Callable[[Path], None]] = {each.__name__: each for each in (four_bits, recipe, wandb, trackio)}
    checks[sys.argv[1]](Path(sys.argv[2]))
