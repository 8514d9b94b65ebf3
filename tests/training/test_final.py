"""What is published of a model that was trained in 4 bits, and what a run in 4 bits needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llara import loading
from llara.config import AdaptConfig, ModelConfig
from llara.errors import ConfigError, MissingExtra
from llara.loading import load_model
from llara.training.adapt import adapt
from llara.training.final import rebuild
from llara.training.lora import add_lora, merge_lora
from llara.training.objective import AdaptModule, Plan
from llara.training.sharding import trained_weights
from tests.training.helpers import adapt_config, weights
from tests.training.rows import prompts_of

TEXTS = ["the sky is blue", "read a file line by line and close it"]


@pytest.mark.parametrize("template", ["paper", "release"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_built_anew_is_the_one_that_was_trained(base: Path, tmp_path: Path, template: str, rank: int) -> None:
    config = adapt_config(base, Path("text"), tmp_path / "out", template=template, lora_rank=rank)
    torch.manual_seed(1)
    model = load_model(config, for_training=True, new_template=True)
    peft_model = add_lora(model, config) if rank else None
    with torch.no_grad():
        for value in model.lm.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
    module = AdaptModule(model, prompts_of(model), Plan("ebae", True, 1.0, 0.0))
    torch.manual_seed(2)  # the rows of new tokens start otherwise in the model built anew
    made = rebuild(config, model, trained_weights(module))
    if peft_model is not None:
        merge_lora(model, peft_model)
    assert made.contract == model.contract
    for side in ("query", "passage"):
        torch.testing.assert_close(made.encode(TEXTS, side), model.encode(TEXTS, side), rtol=0.0, atol=0.0)
    plain = load_model(replace(config, lora_rank=0), for_training=True, new_template=True)
    assert float((made.encode(TEXTS, "query") - plain.encode(TEXTS, "query")).abs().max()) > 1e-3


def test_a_run_in_4_bits_is_published_whole(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"lora_rank": 2, "lora_dropout": 0.0}
    plain = adapt(adapt_config(base, corpus, tmp_path / "plain", **settings)).output
    monkeypatch.setattr(loading, "_quantization", lambda _: {})  # as if 4 bits held all that 32 do
    made = adapt(adapt_config(base, corpus, tmp_path / "made", quantize="4bit", **settings)).output
    assert "opening it again, whole" in capsys.readouterr().err
    found, expected = weights(made), weights(plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    load_model(ModelConfig(model=str(made), device="cpu", verify=True))


def config_of(base: Path, **changes: Any) -> AdaptConfig:
    return adapt_config(base, Path("text"), Path("out"), lora_rank=2, quantize="4bit", **changes)


def test_4_bits_are_for_lora(base: Path) -> None:
    with pytest.raises(ConfigError, match="--quantize: weights of 4 bits cannot be trained; train LoRA"):
        config_of(base).__class__(model="m", corpus=(Path("c"),), output=Path("o"), quantize="4bit")


def test_4_bits_need_bitsandbytes_and_a_gpu(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"--quantize 4bit needs .*pip install 'llara\[quantize\]'"):
        load_model(config_of(base), for_training=True)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ConfigError, match="--quantize: 4bit takes a GPU, and this job runs on cpu"):
        load_model(config_of(base), for_training=True)


def test_transformers_is_told_how_to_quantize(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(loading, "pick_device", lambda _: torch.device("cuda:0"))
    told = loading._quantization(config_of(base, dtype="bfloat16"))
    settings = told["quantization_config"]
    assert told["device_map"] == {"": torch.device("cuda:0")}
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type) == (True, "nf4")
    assert (settings.bnb_4bit_use_double_quant, settings.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
