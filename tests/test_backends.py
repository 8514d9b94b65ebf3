"""Models that something else than torch in float32 runs."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara import Retriever
from llara.backends import use_backend
from llara.config import AdaptConfig, EncodeConfig, ModelConfig, RerankConfig
from llara.errors import ConfigError, MissingExtra, ModelError
from tests import tiny, tiny_encoder

LONG = " ".join(tiny.TEXT * 3)
TEXTS = [*tiny.TEXT, LONG, "a"]


def vectors(retriever: Retriever, budget: int | None = None) -> Any:
    return retriever.encode_passages(TEXTS, token_budget=budget)


def test_int8_is_near_float_and_no_batch_changes_it() -> None:
    exact, rounded = Retriever.load("mini"), Retriever.load("mini", dtype="int8")
    assert rounded.identity["dtype"] == "int8"
    assert {**rounded.identity, "dtype": "float32"} == exact.identity
    found = vectors(rounded)
    cosines = (found * vectors(exact)).sum(axis=1)
    assert cosines.min() > 0.999
    assert cosines.max() < 1 - 1e-6  # else nothing was rounded
    assert np.abs(found - vectors(rounded, budget=1)).max() < 2e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_openvino_gives_the_vectors_of_torch(family: str) -> None:
    pytest.importorskip("openvino")
    model = tiny.model(family)
    expected = vectors(Retriever(model))
    use_backend(model, ModelConfig(model=family, backend="openvino"))
    assert model.runner is not None
    assert np.abs(vectors(Retriever(model)) - expected).max() < 1e-5
    assert np.abs(vectors(Retriever(model), budget=1) - expected).max() < 1e-5


def test_openvino_runs_an_encoder_too() -> None:
    pytest.importorskip("openvino")
    model = tiny_encoder.model("bert")
    expected = vectors(Retriever(model))
    use_backend(model, ModelConfig(model="bert", backend="openvino"))
    assert np.abs(vectors(Retriever(model)) - expected).max() < 1e-5


def test_vectors_that_are_not_near_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr("llara.backends._openvino", lambda *_: lambda ids, _: torch.randn(*ids.shape, tiny.HIDDEN))
    with pytest.raises(ModelError, match=r"OpenVINO in float32 gives other vectors than torch: .* allowed 0.0002"):
        use_backend(model, ModelConfig(model="llama", backend="openvino"))


def test_a_model_that_openvino_cannot_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operation\nand much more")

    monkeypatch.setattr("torch.export.export", fails)
    with pytest.raises(ModelError, match=r"cannot run this model \(no such operation\); use --backend torch$"):
        use_backend(tiny.model("llama"), ModelConfig(model="llama", backend="openvino"))


def test_openvino_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    with pytest.raises(MissingExtra, match="--backend openvino"):
        use_backend(tiny.model("llama"), ModelConfig(model="llama", backend="openvino"))


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (AdaptConfig, {"corpus": (Path("c"),), "dtype": "int8"}, "--dtype: int8 weights have no gradient"),
        (AdaptConfig, {"corpus": (Path("c"),), "backend": "openvino"}, "--backend: openvino only runs models"),
        (RerankConfig, {"run": Path("r"), "queries": Path("q"), "backend": "openvino"}, "rerank takes torch"),
        (EncodeConfig, {"corpus": (Path("c"),), "dtype": "int8", "device": "cuda"}, "--dtype: int8 runs on a CPU"),
        (
            EncodeConfig,
            {"corpus": (Path("c"),), "dtype": "float16", "backend": "openvino"},
            "--dtype: float16 does not go with --backend openvino",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(config: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(model="mini", output=Path("out"), **settings)
