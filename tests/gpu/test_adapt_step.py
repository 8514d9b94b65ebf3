"""The adaptation step on a GPU: packed rows under FlexAttention, and no wait for the device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llara.contract import Contract
from llara.masks import MaskForm
from llara.model import EmbeddingModel
from llara.parity import check_branches, check_packing, check_padding
from llara.training.adapt import adapt
from llara.training.objective import AdaptModule, Plan, Prompts
from llara.training.packing import choose_packing, restore_attention, use_attention
from llara.training.trainer import to_device
from tests import tiny
from tests.training.helpers import adapt_config, computed, write_text
from tests.training.test_objective import NEXT, TEXTS, batch_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text")
# FlexAttention's kernels want heads of 16 dimensions or more.
SHAPE = {"hidden_size": 64, "head_dim": 16}


def make(family: str, device: torch.device, dtype: torch.dtype) -> EmbeddingModel:
    model = tiny.model(family, contract=Contract(bos=True), **SHAPE)
    model.lm.to(device, dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_branches_of_packed_rows_equal_separate_passes(
    family: str, dtype: torch.dtype, cuda: torch.device
) -> None:
    model = make(family, cuda, dtype)
    template = model.bind()
    found = check_branches(model, template, 300)
    assert found.one_pass, found.reason
    alone = check_padding(model, template, 300)
    form = found.form._replace(added=False, blocks=True)
    use_attention(model.lm, Plan("ebae+ebar", True, 1.0, 0.0, form=form, packed=True))
    packed = check_packing(model, template, 300, form, alone)
    assert packed.one_pass, packed.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_gradient_of_padded_ones(family: str, cuda: torch.device) -> None:
    model = make(family, cuda, torch.float32)
    template = model.bind()
    prompts = Prompts(template.passage, template.query, model.pad_id)
    padded = Plan("ebae+ebar", True, 1.0, 0.5, form=check_branches(model, template, 40).form)
    config = adapt_config(Path("base"), Path("corpus"), Path("out"), packing="on")
    packed = choose_packing(padded, model, template, config)
    assert packed.form.blocks
    results = []
    for plan in (padded, packed):
        use_attention(model.lm, plan)
        model.lm.zero_grad()
        batch = to_device(batch_of(TEXTS, NEXT["some"], prompts, plan), cuda)
        loss, _ = AdaptModule(model, prompts, plan)(batch, batch["counts"])
        loss.backward()
        gradient = torch.cat([each.grad.flatten() for each in model.lm.parameters() if each.grad is not None])
        results.append((loss.detach(), gradient))
        restore_attention(model.lm)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    assert float((results[1][1] - results[0][1]).norm()) <= 1e-3 * float(results[0][1].norm())


@pytest.mark.parametrize("lm_weight", [0.0, 1.0])
@pytest.mark.parametrize("packed", [False, True])
def test_no_step_waits_for_the_gpu(packed: bool, lm_weight: float, cuda: torch.device) -> None:
    model = make("llama", cuda, torch.float32)
    template = model.bind()
    prompts = Prompts(template.passage, template.query, model.pad_id)
    plan = Plan("ebae+ebar", True, 1.0, lm_weight, form=MaskForm(blocks=packed), packed=packed)
    use_attention(model.lm, plan)
    batch = to_device(batch_of(TEXTS, NEXT["some"], prompts, plan), cuda)
    module = AdaptModule(model, prompts, plan)
    module(batch, batch["counts"])[0].backward()  # compiles what is compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(batch, batch["counts"])[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes", [{"packing": "on"}, {"compile": True, "packing": "off"}, {"lora_rank": 2, "lora_dropout": 0.0}]
)
def test_a_run_on_a_gpu_learns_what_a_run_on_a_cpu_learns(changes: dict[str, Any], tmp_path: Path) -> None:
    base, corpus = tiny.save_base(tmp_path / "base", **SHAPE), write_text(tmp_path / "text.jsonl")
    common = {"dtype": "float32", "learning_rate": 1e-3, "held_out": 0}
    rank = {key: value for key, value in changes.items() if key.startswith("lora")}
    expected = adapt(adapt_config(base, corpus, tmp_path / "cpu", **common, **rank))
    found = adapt(adapt_config(base, corpus, tmp_path / "gpu", device="cuda", **common, **changes))
    for left, right in zip(computed(found.output), computed(expected.output), strict=True):
        assert left["loss_ebae"] == pytest.approx(right["loss_ebae"], rel=1e-2)
