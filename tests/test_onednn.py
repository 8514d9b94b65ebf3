import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llara import onednn
from llara.config import ModelConfig
from llara.loading import load_model
from llara.onednn import OneDnnLinear, is_amd, leave_onednn, use_onednn, works
from llara.training.layers import compile_layers

needs_the_product = pytest.mark.skipif(not works(), reason="this torch has no such product")


def pair(bias: bool, size: int = 6, out: int = 5) -> tuple[nn.Linear, nn.Linear]:
    """A plain map and one through oneDNN with the same weights."""
    torch.manual_seed(0)
    plain, other = nn.Linear(size, out, bias), nn.Linear(size, out, bias)
    other.load_state_dict(plain.state_dict())
    other.__class__ = OneDnnLinear
    return plain, other


@needs_the_product
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6), (64, 6), (5, 70, 6), (1400, 6)])
def test_products_and_gradients_are_those_of_torch(shape: tuple[int, ...], bias: bool) -> None:
    plain, other = pair(bias)
    states, weights = torch.randn(shape), torch.randn(5)
    found = []
    for each in (plain, other):
        given = states.clone().requires_grad_()
        product = each(given)
        # The second sum's gradient is one number that is seen as an array.
        loss = (product * weights).sin().sum() + product.sum()
        loss.backward()
        with torch.no_grad():
            assert torch.allclose(each(states), product, atol=1e-6)
        found.append([product, given.grad, *(part.grad for part in each.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_the_product
def test_onednn_meets_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps a program for each, some of them megabytes."""
    met: set[tuple[int, ...]] = set()
    plain = onednn._multiply

    def watched(states: Any, weight: Any) -> Any:
        met.add((*states.shape, *weight.shape))
        return plain(states, weight)

    monkeypatch.setattr(onednn, "_multiply", watched)
    _, other = pair(False)
    for rows in range(1, 2600, 13):
        other(torch.randn(rows, 6, requires_grad=True)).sum().backward()
    forward = {(size, 6, 5, 6) for size in onednn.BLOCKS}
    backward = {shape for size in onednn.BLOCKS for shape in ((size, 5, 6, 5), (5, size, 6, size))}
    assert met == forward | backward


@needs_the_product
def test_only_gradients_that_are_asked_for_are_computed() -> None:
    _, other = pair(True)
    other.weight.requires_grad_(False)
    given = torch.randn(2, 6, requires_grad=True)
    other(given).sum().backward()
    assert other.weight.grad is None and given.grad is not None
    with torch.no_grad():
        assert not other(given).requires_grad


@needs_the_product
def test_states_that_are_no_whole_array() -> None:
    plain, other = pair(False)
    parts = torch.randn(6, 70).t(), torch.randn(1, 6).expand(70, 6), torch.randn(30, 4, 12)[:, 1:3, ::2]
    for states in parts:
        assert torch.allclose(plain(states), other(states), atol=1e-6)


def test_other_types_are_as_ever() -> None:
    plain, other = pair(True)
    states = torch.randn(3, 6)
    with torch.autocast("cpu", torch.float16):
        assert other(states).dtype == plain(states).dtype == torch.float16
    assert torch.equal(plain.double()(states.double()), other.double()(states.double()))


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster_here", works)


def kinds(model: Any) -> set[str]:
    return {type(part).__name__ for part in model.modules() if "Linear" in type(part).__name__}


@needs_the_product
@pytest.mark.usefixtures("everywhere")
def test_a_model_has_the_vectors_that_it_has_without() -> None:
    texts = ["a text of some words", "another", "and a third one that is longer than both of them"] * 30
    model = load_model(ModelConfig(model="mini", device="cpu"))
    assert kinds(model.lm.base_model) == kinds(copy.deepcopy(model.lm.base_model)) == {"OneDnnLinear"}
    assert type(model.lm.get_output_embeddings()) is nn.Linear
    with_it = model.encode(texts, "passage")
    leave_onednn(model.lm)
    assert kinds(model.lm) == {"Linear"}
    assert torch.allclose(with_it, model.encode(texts, "passage"), atol=1e-5)


@needs_the_product
@pytest.mark.usefixtures("everywhere")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler uses it
def test_rounded_maps_and_compiled_ones_are_as_ever() -> None:
    assert kinds(load_model(ModelConfig(model="mini", device="cpu", dtype="int8")).lm.base_model) == {"Int8Linear"}
    model = load_model(ModelConfig(model="mini", device="cpu"))
    compile_layers(model.lm, "mini")  # as they are first used, which they are not here
    assert kinds(model.lm) == {"Linear"}


def test_a_machine_that_gains_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    monkeypatch.setattr(onednn, "is_faster_here", lambda: False)
    use_onednn(layers)
    assert type(layers[0]) is nn.Linear
    for text, amd in (("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False)):
        (tmp_path / "cpuinfo").write_text(text)
        assert is_amd(tmp_path / "cpuinfo") is amd
    assert not is_amd(tmp_path / "none")


@pytest.mark.parametrize("error", [AttributeError("gone"), RuntimeError("other arguments"), TypeError("fewer of them")])
def test_a_product_that_torch_has_no_more_is_not_used(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def gone(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(onednn, "_multiply", gone)
    assert not works()
    monkeypatch.setattr(onednn, "_multiply", lambda states, weight: states.new_zeros(len(states), len(weight)))
    assert not works(), "zeros are no product"
