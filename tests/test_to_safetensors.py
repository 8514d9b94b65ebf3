"""recipes/to_safetensors.py: what was published as pickles gives the same vectors and scores, and nothing is run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llara.config import ModelConfig
from llara.loading import load_model
from llara.reranker import load_reranker
from tests import tiny
from tests.tiny_reranker import save_adapter

pytestmark = pytest.mark.usefixtures("recipes_importable")
TEXTS = ["the sky is blue", "read a file"]


@pytest.fixture
def convert(recipes_importable: None) -> Callable[[Path, Path], int]:
    from to_safetensors import main

    return lambda source, output: main([str(source), str(output)])


def pickled(folder: Path, *, files: int = 1) -> Path:
    """Makes a folder's weights a pickle, or several with an index, as old checkpoints have them."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    if files == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        placed = {name: f"pytorch_model-{n % files + 1:05d}-of-{files:05d}.bin" for n, name in enumerate(names)}
        for file in set(placed.values()):
            torch.save({name: weights[name] for name in names if placed[name] == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def vectors(folder: Path) -> list[list[float]]:
    model = load_model(ModelConfig(model=str(folder), device="cpu"))
    return [row.tolist() for row in model.encode(TEXTS, "passage")]


@pytest.mark.parametrize("files", [1, 3])
def test_a_model_opens_with_the_same_vectors(tmp_path: Path, convert: Callable[..., int], files: int) -> None:
    expected = vectors(tiny.save_base(tmp_path / "base"))
    assert convert(pickled(tmp_path / "base", files=files), tmp_path / "made") == 0
    assert vectors(tmp_path / "made") == expected
    assert not list((tmp_path / "made").glob("*.bin*"))


def test_tied_weights_each_get_memory_of_their_own(tmp_path: Path, convert: Callable[..., int]) -> None:
    folder = tmp_path / "tied"
    folder.mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": shared, "head": shared, "turned": shared.T}, folder / "pytorch_model.bin")
    assert convert(folder, tmp_path / "made") == 0
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(found["embed"], shared) and torch.equal(found["head"], shared)
    assert torch.equal(found["turned"], shared.T)


def test_an_adapter_scores_the_same(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(tmp_path / "adapter", tiny.save_base(tmp_path / "base"))
    config = ModelConfig(model=str(tmp_path / "adapter"), device="cpu")
    expected = load_reranker(config).score(TEXTS, TEXTS).tolist()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert convert(tmp_path / "adapter", tmp_path / "made") == 0
    assert f"next: llara rerank --model {tmp_path / 'made'}" in capsys.readouterr().out
    made = load_reranker(ModelConfig(model=str(tmp_path / "made"), device="cpu"))
    assert made.score(TEXTS, TEXTS).tolist() == expected


class Runs:
    """What a hostile pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_nothing_in_a_pickle_is_run(
    tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mark = tmp_path / "hostile", tmp_path / "was-run"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Runs(mark)}))
    assert convert(folder, tmp_path / "made") == 2
    assert "pytorch_model.bin: cannot be read as tensors alone" in capsys.readouterr().err
    assert not mark.exists() and not (tmp_path / "made").exists()


def test_mistakes(tmp_path: Path, convert: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.save_base(tmp_path / "base")
    assert convert(base, tmp_path / "made") == 2
    assert "base: holds no pytorch_model*.bin and no adapter_model.bin" in capsys.readouterr().err
    assert convert(pickled(base), base) == 2
    assert "base: exists already" in capsys.readouterr().err
    torch.save({"step": 3}, base / "pytorch_model.bin")
    assert convert(base, tmp_path / "made") == 2
    assert "pytorch_model.bin: holds more than tensors: step" in capsys.readouterr().err
