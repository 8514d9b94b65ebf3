"""What a job would take on GPUs that are not here: operations, memory and advice, from shapes alone."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from llara.cli.parse import parse
from llara.contract import Contract
from llara.hardware import Fleet, Gpu, parse_fleet
from llara.model import EmbeddingModel
from llara.plan.config import PlanAdaptConfig, PlanEncodeConfig
from llara.plan.fleet import Load, _forward, _inputs, estimate_encoding, estimate_training, run_on_meta
from llara.plan.report import FleetEstimate
from tests import tiny

WIDTH, SLOTS, VOCABULARY = 61, 2, 400
LOAD = Load(cells=1e9, cells_per_pass=10_000, width=WIDTH, slots=SLOTS)


def outline(family: str = "llama", **changes: Any) -> EmbeddingModel:
    lm = tiny.language_model(family, VOCABULARY, **changes).to("meta").requires_grad_(True)
    return EmbeddingModel(lm, None, Contract(), "tiny", "tiny")


def config(**changes: Any) -> PlanAdaptConfig:
    values = {"model": "tiny", "corpus": (Path("c"),), **changes}
    return PlanAdaptConfig(**values)


def estimate(fleet: Fleet, load: Load = LOAD, **changes: Any) -> FleetEstimate:
    return estimate_training(config(**changes), outline(), fleet, load)


def gpu(memory: int, number: int = 1) -> Fleet:
    return Fleet(number, "TEST", Gpu((1,), 100.0, 10.0), memory / 1e9)  # type: ignore[arg-type]


def test_operations_are_those_of_the_products_in_the_model() -> None:
    model = outline()
    hidden, inner, layers, heads, key_heads = tiny.HIDDEN, 2 * tiny.HIDDEN, tiny.LAYERS, tiny.HEADS, 2
    size = hidden // heads
    projections = 2 * hidden * hidden + 2 * hidden * key_heads * size + 3 * hidden * inner
    attention = 2 * heads * WIDTH * size
    forward = 2 * WIDTH * layers * (projections + attention) + 2 * SLOTS * hidden * VOCABULARY
    assert run_on_meta(model, WIDTH, SLOTS, torch.float32, train=False).operations == forward
    assert run_on_meta(model, WIDTH, SLOTS, torch.float32, train=True).operations == 3 * forward


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_kept_without_memory_is_what_is_kept_with_it(family: str) -> None:
    model = EmbeddingModel(tiny.language_model(family, VOCABULARY), None, Contract(), "tiny", "tiny")
    model.lm.train()
    weights = {weight.untyped_storage()._cdata for weight in model.lm.parameters()}
    kept: dict[int, torch.Tensor] = {}
    inputs = _inputs(model, WIDTH)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights and tuple(tensor.shape[-2:]) != (WIDTH, WIDTH):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with sdpa_kernel(SDPBackend.MATH), saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, inputs, SLOTS)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert run_on_meta(outline(family), WIDTH, SLOTS, torch.float32, train=True).kept == pytest.approx(held, rel=0.02)


def test_a_model_without_a_prepared_mask_is_counted_too() -> None:
    assert run_on_meta(outline("bloom"), WIDTH, SLOTS, torch.float32, train=True).operations > 0


def test_full_training_holds_sixteen_bytes_per_weight_and_a_copy() -> None:
    weights = sum(weight.numel() for weight in outline().lm.parameters())
    memory = estimate(gpu(10**12)).memory
    assert [memory[name] for name in ("weights", "gradients", "optimizer", "bfloat16 copy")] == [
        4 * weights, 4 * weights, 8 * weights, 2 * weights,
    ]  # fmt: skip
    assert "exchange" not in memory
    assert estimate(gpu(10**12, number=2)).memory["exchange"] == 4 * weights


def test_lora_holds_frozen_weights_in_half_and_little_on_top() -> None:
    full, lora = estimate(gpu(10**12)), estimate(gpu(10**12), lora_rank=4)
    assert lora.memory["weights"] < 0.8 * full.memory["weights"]
    assert lora.memory["optimizer"] < 0.5 * full.memory["optimizer"]
    assert lora.operations < full.operations


def test_checkpointing_runs_the_forward_pass_again() -> None:
    full = [estimate(gpu(10**12), gradient_checkpointing=on).operations for on in (False, True)]
    layers = run_on_meta(outline(), WIDTH, 0, torch.bfloat16, train=False)  # the LM head is not run again
    assert full[1] - full[0] == pytest.approx(LOAD.cells * layers.operations / layers.width)
    assert 1.3 * full[0] < full[1] < 4 / 3 * full[0]
    lora = [estimate(gpu(10**12), lora_rank=1, gradient_checkpointing=on).operations for on in (False, True)]
    assert 1.36 * lora[0] < lora[1] < 1.5 * lora[0]  # frozen weights have no gradient, so forward is half of it


def test_time_is_operations_over_the_share_of_the_peak() -> None:
    found = estimate(gpu(10**12), peak_share=0.5)
    assert found.seconds == pytest.approx(found.operations / (100e12 * 0.5))
    assert estimate(gpu(10**12), peak_share=0.25).seconds == pytest.approx(2 * found.seconds)


def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so() -> None:
    found = estimate(parse_fleet("V100"))
    assert found.peak_tflops == 15.7
    assert found.advice == ("V100 has no bfloat16: weights and arithmetic are float32",)
    encode = PlanEncodeConfig(model="tiny", corpus=(Path("c"),))
    assert estimate_encoding(encode, outline(), parse_fleet("V100"), LOAD).peak_tflops == 125.0


def advised(found: FleetEstimate) -> list[str]:
    return [advice.partition(" fits")[0] for advice in found.advice if " fits" in advice]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_each_advice_makes_it_fit(share: float) -> None:
    roomy = estimate(gpu(10**12))
    assert roomy.fits and not roomy.advice
    # The runtime's share is set aside, so that it is the model's own needs that do not fit.
    memory = roomy.memory["runtime"] + int(share * (sum(roomy.memory.values()) - roomy.memory["runtime"]))
    tight = estimate(gpu(memory))
    assert not tight.fits
    assert advised(tight)
    for flags in advised(tight):
        parsed = parse(["plan", "adapt", "--model", "m", "--corpus", "c", *shlex.split(flags)])
        assert parsed is not None and isinstance(parsed.config, PlanAdaptConfig)
        load = replace(LOAD, cells_per_pass=min(parsed.config.token_budget or LOAD.cells_per_pass, LOAD.cells_per_pass))
        assert estimate_training(parsed.config, outline(), gpu(memory), load).fits, flags


def test_what_nothing_here_makes_fit_is_said() -> None:
    assert estimate(gpu(1000)).advice == (
        "take GPUs with more memory, or a smaller model: none of the settings here is enough",
    )


def test_several_gpus_come_with_how_to_start_them() -> None:
    assert estimate(gpu(10**12, number=8)).advice == ("start it with: torchrun --nproc-per-node 8 -m llara adapt ...",)


def test_encoding_holds_half_weights_and_a_layer_or_two() -> None:
    encode = PlanEncodeConfig(model="tiny", corpus=(Path("c"),))
    found = estimate_encoding(encode, outline(), gpu(10**12), replace(LOAD, slots=0))
    weights = sum(weight.numel() for weight in outline().lm.parameters())
    assert found.memory["weights"] == 2 * weights
    training = estimate(gpu(10**12))
    assert found.operations < training.operations / 2.5
    assert found.memory["activations"] < 2 * training.memory["activations"]
