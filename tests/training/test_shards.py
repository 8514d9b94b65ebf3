"""A module sharded over processes trains as a whole one does, and what it leaves is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llara.config import ModelConfig
from llara.loading import load_model
from tests.training.helpers import computed, record, weights
from tests.training.test_ranks import ENVIRONMENT, ROOT

TEXTS = ["the sky is blue", "read a file line by line and close it"]


@pytest.fixture(scope="module")
def made(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `shards.py` left."""
    folder = tmp_path_factory.mktemp("shards")
    command = [sys.executable, "-m", "tests.training.shards", str(base), str(corpus), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    failed = {name for name, codes in json.loads((folder / "codes.json").read_text()).items() if any(codes)}
    assert failed == {"killed"}, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
def test_a_step_has_the_loss_and_the_gradients_of_a_whole_module(made: Path, family: str) -> None:
    for rank in (0, 1):
        found = json.loads((made / family / f"rank-{rank}.json").read_text())
        assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)
        assert found["worst"] < 1e-5
        assert found["same"]
        assert (found["weights"] > 0) == (rank == 0), "whole weights are gathered in one process alone"


def vectors(folder: Path) -> torch.Tensor:
    model = load_model(ModelConfig(model=str(folder), device="cpu", verify=True))
    return torch.cat([model.encode(TEXTS, "query"), model.encode(TEXTS, "passage")])


@pytest.mark.parametrize(("sharded", "whole"), [("sharded", "whole"), ("lora-sharded", "lora")])
def test_the_published_folder_is_whole(made: Path, base: Path, sharded: str, whole: str) -> None:
    found, expected = weights(made / sharded / "model"), weights(made / whole / "model")
    assert {name: value.shape for name, value in found.items()} == {k: v.shape for k, v in expected.items()}
    # Adam divides by the gradient's size, so rounding shows more in weights than in gradients.
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)
    made_vectors = vectors(made / sharded / "model")
    torch.testing.assert_close(made_vectors, vectors(made / whole / "model"), rtol=1e-3, atol=1e-3)
    assert float((made_vectors - vectors(base)).abs().max()) > 1e-2
    logs = [computed(made / name / "model") for name in (sharded, whole)]
    for left, right in zip(*logs, strict=True):
        assert left.keys() == right.keys()
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


def test_a_sharded_run_goes_on_bit_for_bit(made: Path) -> None:
    for name in ("model.safetensors", "training.json"):
        assert record(made / "resumed" / "model" / name) == record(made / "sharded" / "model" / name)
    assert computed(made / "resumed" / "model") == computed(made / "sharded" / "model")
