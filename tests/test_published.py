"""Folders that sentence-transformers wrote: their own files say how they pool, and llara says that they did."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llara.config import ModelConfig
from llara.errors import LlaraError, ModelError, StorageError
from llara.hub import OTHER_FOLDERS
from llara.loading import load_model
from llara.published import Published, read_published
from tests import tiny, tiny_encoder
from tests.folders import load
from tests.reference import encoders as slow

TEXTS = [*tiny.TEXT, "a", "sky blue"]
MEAN_POOLING = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
CLS_POOLING = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {family: tiny_encoder.save_encoder(root / family, family) for family in ("bert", "t5")}


@pytest.fixture
def bert(plain: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain["bert"], tmp_path / "bert"))


@pytest.fixture
def t5(plain: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain["t5"], tmp_path / "t5"))


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize(
    ("values", "pooling"),
    [
        (MEAN_POOLING, "mean"),
        (CLS_POOLING, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({**CLS_POOLING, "include_prompt": False}, "cls"),
        ({**MEAN_POOLING, "include_prompt": False}, "mean"),
    ],
)
@pytest.mark.parametrize("normalise", [True, False])
def test_a_published_encoder_opens_without_flags(
    bert: Path, values: dict[str, Any], pooling: str, normalise: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_encoder.add_modules(bert, values, normalise=normalise))
    expected = slow.encode(bert, TEXTS, pooling, length=64, normalise=normalise)
    assert worst(model.encode(TEXTS, "query"), expected) < 1e-5
    how = f"{pooling} pooling, {'normalised' if normalise else 'not normalised'}, no prompts"
    assert capsys.readouterr().err == (
        f"{bert}: no llara.json in the folder; an encoder, using template sentence-transformers: {how}; so its own "
        "files say (sentence-transformers)\n"
    )


@pytest.mark.parametrize("passage", ["document", "passage", "corpus"])
def test_prompts_are_read_too(bert: Path, passage: str) -> None:
    model = load(tiny_encoder.add_modules(bert, MEAN_POOLING, prompts={"query": "Q: ", passage: "P: "}))
    for side, prompt in (("query", "Q: "), ("passage", "P: ")):
        expected = slow.encode(bert, TEXTS, "mean", length=64, prompt=prompt)
        assert worst(model.encode(TEXTS, side, max_length=64), expected) < 1e-6  # type: ignore[arg-type]


def test_a_default_prompt_is_for_both_sides(bert: Path) -> None:
    tiny_encoder.add_modules(bert, CLS_POOLING)
    tiny_encoder.write(
        bert / "config_sentence_transformers.json", {"prompts": {"any": "Text: "}, "default_prompt_name": "any"}
    )
    found = read_published(bert)
    assert found is not None and found.template is not None
    assert (found.template.query.prefix, found.template.passage.prefix) == ("Text: ", "Text: ")


def test_the_users_word_comes_first_and_a_difference_is_said(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_encoder.add_modules(bert, CLS_POOLING, normalise=False)
    model = load(bert, template="e5")
    assert (model.contract.pooling, model.contract.normalise) == ("mean", True)
    said = capsys.readouterr().err
    assert "using template e5: mean pooling, normalised, query prompt 'query: ', passage prompt 'passage: '" in said
    assert said.endswith("; its own files say cls pooling, not normalised\n")
    load(bert, template="retromae")
    assert "its own files" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "prompts", "named"),
    [
        ({"pooling_mode_max_tokens": True}, None, "max_tokens"),
        ({"pooling_mode": "lasttoken"}, None, "lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None, "cls_token+mean_tokens"),
        ({**MEAN_POOLING, "include_prompt": False}, {"query": "Q: "}, "mean_tokens without its prompt"),
    ],
)
def test_a_pooling_that_llara_does_not_do_is_named(
    bert: Path, values: dict[str, Any], prompts: Any, named: str
) -> None:
    tiny_encoder.add_modules(bert, values, prompts=prompts)
    with pytest.raises(ModelError) as caught:
        load(bert)
    assert (
        f"is an encoder (bert), whose positions see what stands after them; its own files name {named} pooling, "
        in str(caught.value)
    )
    assert load(bert, template="mean").contract.pooling == "mean"


def test_a_saved_encoder_goes_by_its_contract_alone(bert: Path, tmp_path: Path) -> None:
    load(tiny_encoder.add_modules(bert, MEAN_POOLING, prompts={"query": "Q: "})).save(tmp_path / "saved")
    again = load(tmp_path / "saved", verify=True)
    assert again.contract.template.name == "sentence-transformers"
    assert worst(again.encode(TEXTS, "query"), load(bert).encode(TEXTS, "query")) == 0


def test_a_decoders_own_files_are_not_read(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    expected = load(base).encode(TEXTS, "query")
    tiny_encoder.add_modules(base, {"pooling_mode": "lasttoken"})
    assert torch.equal(load(base).encode(TEXTS, "query"), expected)


# GTR: the encoder of T5 with a projection


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_stands_between_pooling_and_vector(t5: Path, bias: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = {"linear.weight": torch.randn(12, tiny.HIDDEN, generator=generator)}
    dense |= {"linear.bias": torch.randn(12, generator=generator)} if bias else {}
    tiny_encoder.add_modules(t5, MEAN_POOLING, dense=dense)
    model = load(t5)
    assert model.dim == 12
    states = slow.encode(t5, TEXTS, "mean", length=64, normalise=False)
    projected = torch.nn.functional.linear(states, dense["linear.weight"], dense.get("linear.bias"))
    expected = projected / projected.norm(dim=1, keepdim=True)
    assert worst(model.encode(TEXTS, "query"), expected) < 1e-6
    assert worst(load(t5, template="mean").encode(TEXTS, "query"), expected) < 1e-6, "the projection is no choice"
    model.save(tmp_path / "saved")
    assert "projection.weight" in load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(load(tmp_path / "saved").encode(TEXTS, "query"), model.encode(TEXTS, "query"))
    outline = load_model(ModelConfig(model=str(t5)), weights=False)
    assert (outline.dim, outline.lm.projection.weight.device.type) == (12, "meta")


@pytest.mark.parametrize(
    ("shape", "activation", "message"),
    [
        (
            (12, tiny.HIDDEN),
            "torch.nn.modules.activation.Tanh",
            r"projects with the activation .*Tanh, which llara does",
        ),
        ((12, 7), "torch.nn.modules.linear.Identity", r"its projection has the shape \[12, 7\], and states 32"),
    ],
)
def test_a_projection_that_does_not_fit(t5: Path, shape: tuple[int, int], activation: str, message: str) -> None:
    tiny_encoder.add_modules(t5, MEAN_POOLING, dense={"linear.weight": torch.ones(shape)}, activation=activation)
    with pytest.raises(ModelError, match=message):
        load(t5)


def test_a_pickled_projection_is_not_read(t5: Path) -> None:
    tiny_encoder.add_modules(t5, MEAN_POOLING, dense={"linear.weight": torch.ones(12, tiny.HIDDEN)})
    (t5 / "2_Dense" / "model.safetensors").rename(t5 / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"2_Dense: holds no \.safetensors weights with linear\.weight; pickled weights"
    ):
        load(t5)


# Files that do not fit

STEP = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOL = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORM = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({}, r"modules\.json: is no list of the steps"),
        ([1], r"modules\.json: is no list of the steps"),
        ([STEP], "names no model in this folder itself with a pooling after it"),
        ([{**STEP, "path": "0_Transformer"}, POOL], "names no model in this folder itself with a pooling after it"),
        (
            [STEP, NORM, POOL],
            "goes from text to vector by Transformer, Normalize, Pooling; llara knows Transformer, Pool",
        ),
        ([STEP, POOL, POOL], "by Transformer, Pooling, Pooling; llara knows"),
        (
            [STEP, {**POOL, "type": "sentence_transformers.models.CNN"}, POOL],
            "by Transformer, CNN, Pooling; llara knows",
        ),
        ([STEP, {**POOL, "path": "../elsewhere"}], "which is no file name"),
        ([STEP, {**POOL, "path": 3}], "which is no file name"),
    ],
)
def test_steps_that_llara_does_not_know(bert: Path, steps: Any, message: str) -> None:
    tiny_encoder.add_modules(bert, MEAN_POOLING)
    (bert / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(LlaraError, match=message):
        load(bert)
    with pytest.raises(LlaraError, match=message):  # what it does not know would change the vectors of any pooling
        load(bert, template="mean")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", "[", "is damaged: not valid JSON"),
        ("1_Pooling/config.json", None, r"1_Pooling/config\.json: "),
        ("1_Pooling/config.json", "[]", r"1_Pooling/config\.json: is no object"),
        ("config_sentence_transformers.json", '{"prompts": {"query": 3}}', "prompts must be strings"),
    ],
)
def test_files_that_cannot_be_read(bert: Path, name: str, content: str | None, message: str) -> None:
    tiny_encoder.add_modules(bert, MEAN_POOLING)
    (bert / name).unlink(missing_ok=True)
    if content is not None:
        (bert / name).write_text(content)
    with pytest.raises((ModelError, StorageError), match=message):
        load(bert)


@pytest.mark.parametrize("content", ["[]", "{}", '{"prompts": null}', '{"prompts": {}, "default_prompt_name": ["a"]}'])
def test_prompts_that_are_not_there_are_empty(bert: Path, content: str) -> None:
    tiny_encoder.add_modules(bert, MEAN_POOLING)
    (bert / "config_sentence_transformers.json").write_text(content)
    found = read_published(bert)
    assert found is not None and found.template is not None
    assert (found.template.query.prefix, found.template.passage.prefix) == ("", "")


def test_a_folder_without_them(bert: Path) -> None:
    assert read_published(bert) is None
    assert Published(None, "max").projection is None


def test_of_a_hub_only_the_folders_of_steps_are_fetched() -> None:
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json", "model.safetensors"):
        assert not fnmatch.fnmatch(name, OTHER_FOLDERS)
    for name in ("onnx/model.onnx", "original/params.json", "fp16/model.safetensors", "openvino/1/config.json"):
        assert fnmatch.fnmatch(name, OTHER_FOLDERS)
