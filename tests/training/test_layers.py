"""Recomputed activations and compiled layers: faster or smaller, and the same result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llara.errors import ConfigError, ModelError
from llara.training import layers
from llara.training.adapt import adapt
from llara.training.layers import prepare_layers, release_layers
from tests import tiny
from tests.training.helpers import adapt_config, log_lines, weights


class Holder(nn.Module):
    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm


def gradients(lm: Any, *, count: bool = False) -> tuple[list[torch.Tensor], int]:
    """Returns the gradients of a loss on two texts, and how often layers were run."""
    runs = []
    counted = lm.model.layers if count else []
    hooks = [layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1)) for layer in counted]
    lm.zero_grad()
    ids = torch.arange(40).reshape(2, 20)
    lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return [weight.grad.clone() for weight in lm.parameters()], len(runs)


def test_recomputed_activations_give_the_same_gradients() -> None:
    lm = tiny.language_model("llama").train()
    expected, once = gradients(lm, count=True)
    prepare_layers(Holder(lm), adapt_config(Path("base"), Path("corpus"), Path("out"), gradient_checkpointing=True))
    found, twice = gradients(lm, count=True)
    assert (once, twice) == (tiny.LAYERS, 2 * tiny.LAYERS)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("rank", [0, 2])
def test_recomputing_activations_changes_no_bit_of_a_run(base: Path, corpus: Path, tmp_path: Path, rank: int) -> None:
    plain = adapt(adapt_config(base, corpus, tmp_path / "plain", lora_rank=rank))
    config = adapt_config(base, corpus, tmp_path / "recomputed", lora_rank=rank, gradient_checkpointing=True)
    found, expected = weights(adapt(config).output), weights(plain.output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_that_cannot_recompute_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.language_model("llama")
    monkeypatch.setattr(type(lm), "supports_gradient_checkpointing", False)
    config = adapt_config(Path("base"), Path("corpus"), Path("out"), gradient_checkpointing=True)
    with pytest.raises(
        ModelError, match=r"base: cannot compute activations again .*leave out --gradient-checkpointing"
    ):
        prepare_layers(Holder(lm), config)


def compiles() -> str | None:
    try:
        layers.check_compiler(adapt_config(Path("base"), Path("corpus"), Path("out"), compile=True))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
def test_compiled_layers_give_the_same_gradients_but_for_rounding() -> None:
    reason = compiles()
    if reason:
        pytest.skip(reason)
    lm = tiny.language_model("llama", num_hidden_layers=1).train()
    expected, _ = gradients(lm)
    torch._dynamo.utils.counters.clear()
    prepare_layers(Holder(lm), adapt_config(Path("base"), Path("corpus"), Path("out"), compile=True))
    found, _ = gradients(lm)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for left, right in zip(found, expected, strict=True):
        assert float((left - right).norm()) <= 1e-5 * float(right.norm())


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_loses_what_another_does(corpus: Path, tmp_path: Path) -> None:
    reason = compiles()
    if reason:
        pytest.skip(reason)
    base, seen = tiny.save_base(tmp_path / "base", num_hidden_layers=1), []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        config = adapt_config(base, corpus, tmp_path / str(compiled), steps=3, log_every=1, compile=compiled)
        seen.append([line["loss"] for line in log_lines(adapt(config).output)])
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) is compiled
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_a_run_compiles_its_layers(base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(layers, "check_compiler", lambda config: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compiled.append(self))
    adapt(adapt_config(base, corpus, tmp_path / "out", compile=True, steps=1))
    assert len(compiled) == tiny.LAYERS


def test_layers_are_compiled_one_by_one_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(layers, "check_compiler", lambda config: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: compiled.append((type(self).__name__, settings)))
    holder = Holder(tiny.language_model("qwen3"))
    prepare_layers(holder, adapt_config(Path("base"), Path("corpus"), Path("out"), compile=True))
    assert compiled == [("Qwen3DecoderLayer", {"dynamic": True})] * tiny.LAYERS
    holder.lm.model.layers[0]._compiled_call_impl = lambda *_: None
    release_layers(holder)
    assert all(part._compiled_call_impl is None for part in holder.modules())


def test_a_machine_that_cannot_compile_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("no g++ found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    assert "--compile: torch cannot compile here (no g++ found); on a CPU it needs g++" in str(compiles())


def test_a_model_without_named_layers_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "check_compiler", lambda config: None)
    with pytest.raises(ModelError, match="base: does not say what its layers are"):
        prepare_layers(Holder(nn.Linear(2, 2)), adapt_config(Path("base"), Path("corpus"), Path("out"), compile=True))
