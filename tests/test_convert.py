"""What was published as pickles gives the same vectors and scores, and nothing in it is run."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llara.config import ConvertConfig, ModelConfig
from llara.convert import ConvertResult, convert
from llara.errors import ModelError, StorageError
from llara.loading import load_model
from llara.reranker import load_reranker
from tests import tiny
from tests.tiny_reranker import save_adapter

TEXTS = ["the sky is blue", "read a file"]


def made(source: Path, output: Path) -> ConvertResult:
    return convert(ConvertConfig(model=str(source), output=output))


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
def test_a_model_opens_with_the_same_vectors(tmp_path: Path, files: int) -> None:
    expected = vectors(tiny.save_base(tmp_path / "base"))
    tensors = len(load_file(tmp_path / "base" / "model.safetensors"))
    result = made(pickled(tmp_path / "base", files=files), tmp_path / "made")
    assert (result.files, result.tensors) == (files, tensors)
    assert result.next_command is not None and f"encode --model {tmp_path / 'made'} --corpus" in result.next_command
    assert vectors(tmp_path / "made") == expected
    assert not list((tmp_path / "made").glob("*.bin*"))


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    folder = pickled(tiny.save_base(tmp_path / "base"), files=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ModelError, match=r"lacks pytorch_model-00002-of-00003\.bin, which pytorch_model\.bin\.index"):
        made(folder, tmp_path / "made")
    (folder / "pytorch_model.bin.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin\.index\.json: is no index of weights"):
        made(folder, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_folders_of_sentence_transformers_come_along(tmp_path: Path) -> None:
    folder = pickled(tiny.save_base(tmp_path / "base"))
    (folder / "modules.json").write_text("[]")
    for name in ("1_Pooling", "2_Dense", "onnx"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    torch.save({"linear.weight": torch.eye(2)}, folder / "2_Dense" / "pytorch_model.bin")
    made(folder, tmp_path / "made")
    found = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*") if path.is_file()}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= found
    assert not any(path.startswith("onnx") for path in found)


def test_tied_weights_each_get_memory_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    folder.mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": shared, "head": shared, "turned": shared.T}, folder / "pytorch_model.bin")
    made(folder, tmp_path / "made")
    found = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(found["embed"], shared) and torch.equal(found["head"], shared)
    assert torch.equal(found["turned"], shared.T)


def test_an_adapter_scores_the_same(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", tiny.save_base(tmp_path / "base"))
    config = ModelConfig(model=str(tmp_path / "adapter"), device="cpu")
    expected = load_reranker(config).score(TEXTS, TEXTS).tolist()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    result = made(tmp_path / "adapter", tmp_path / "made")
    assert result.next_command is not None and f"rerank --model {tmp_path / 'made'}" in result.next_command
    again = load_reranker(ModelConfig(model=str(tmp_path / "made"), device="cpu"))
    assert again.score(TEXTS, TEXTS).tolist() == expected


def test_an_adapter_of_a_retriever_is_to_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "FEATURE_EXTRACTION"}))
    torch.save({"weight": torch.ones(2)}, folder / "adapter_model.bin")
    assert made(folder, tmp_path / "made").next_command is None
    assert "made: is a PEFT adapter; merge it into its base model" in capsys.readouterr().err


def test_a_base_of_pickles_is_named(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    pickled(base)
    with pytest.raises(ModelError, match=rf"pickled weights are not read; .*: llara convert --model {base}$"):
        load_reranker(ModelConfig(model=str(tmp_path / "adapter"), device="cpu"))


class Runs:
    """What a hostile pickle does when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    folder, mark = tmp_path / "hostile", tmp_path / "was-run"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Runs(mark)}))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: cannot be read as tensors alone"):
        made(folder, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile"], "neither the mark nor a left-over"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"step": 3}, "holds more than dense tensors under names: step"),
        ({3: torch.ones(2)}, "holds more than dense tensors under names: 3"),
        ({"sparse": torch.eye(2).to_sparse()}, "holds more than dense tensors under names: sparse"),
        ([torch.ones(2)], "holds no tensors under names, but a list"),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, content: Any, said: str) -> None:
    base = tiny.save_base(tmp_path / "base")
    torch.save(content, base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"pytorch_model\.bin: {said}"):
        made(base, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_mistakes(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    with pytest.raises(ModelError, match=r"base: holds no pytorch_model\*\.bin and no adapter_model\.bin"):
        made(base, tmp_path / "made")
    with pytest.raises(StorageError, match=r"base: exists already and is not empty"):
        made(pickled(base), base)
    for name in ("none", "a/b/c", "org/name@", "org/"):
        with pytest.raises(ModelError, match=f"{name}: no such folder, and not a hub id of the form"):
            made(Path(name) if not name.endswith("/") else name, tmp_path / "made")  # type: ignore[arg-type]
