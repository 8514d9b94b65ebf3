"""Whether rows are packed: only where it was asked for or pays, and only where the model gives the same there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex_integration

from llara.errors import ModelError
from llara.masks import MaskForm
from llara.model import EmbeddingModel
from llara.parity import Parity
from llara.training import packing
from llara.training.adapt import adapt
from llara.training.objective import AdaptModule, Plan, Prompts
from llara.training.packing import choose_packing, restore_attention, use_attention
from tests import tiny
from tests.training.helpers import adapt_config, computed
from tests.training.test_objective import NEXT, TEXTS, batch_of

PLAN = Plan("ebae+ebar", True, 1.0, 0.0)


def config(**changes: Any) -> Any:
    return adapt_config(Path("base"), Path("corpus"), Path("out"), **changes)


def choose(model: EmbeddingModel, plan: Plan = PLAN, **changes: Any) -> Plan:
    return choose_packing(plan, model, model.bind(), config(**changes))


def test_rows_are_not_packed_on_a_cpu_unless_asked_for() -> None:
    model = tiny.model("llama")
    assert choose(model) == choose(model, packing="off") == PLAN
    assert choose(model, packing="on") == PLAN._replace(packed=True)


def test_a_packed_run_learns_what_a_padded_one_learns(base: Path, corpus: Path, tmp_path: Path) -> None:
    results = []
    for packing_ in ("off", "on"):
        changes = {"packing": packing_, "steps": 6, "measure_every": 3, "learning_rate": 1e-3, "held_out": 2}
        made = adapt(adapt_config(base, corpus, tmp_path / packing_, **changes))
        results.append(computed(made.output))
    for padded, packed in zip(*results, strict=True):
        assert padded["loss_ebae"] == pytest.approx(packed["loss_ebae"], rel=1e-3)
        assert padded["loss_ebar"] == pytest.approx(packed["loss_ebar"], rel=1e-3)


def test_what_was_asked_for_and_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    with pytest.raises(
        ModelError, match=r"base: cannot be trained in packed rows \(the branches run apart\); leave out"
    ):
        choose(model, PLAN._replace(one_pass=False), packing="on")
    monkeypatch.setattr(packing, "check_packing", lambda *_: Parity(False, "differ by 1e+00"))
    with pytest.raises(ModelError, match=r"packed rows \(differ by 1e\+00\)"):
        choose(model, packing="on")


class OnGpu(EmbeddingModel):
    """Says that it is on a GPU, where it is not; what is on the CPU runs there."""

    device = property(lambda self: Device())  # type: ignore[assignment]


class Device(str):
    type = "cuda"

    def __new__(cls) -> "Device":
        return super().__new__(cls, "cpu")


def pretend(model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> EmbeddingModel:
    monkeypatch.setattr(packing, "_train_once", lambda *_: None)
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    return OnGpu(model.lm, model.tokenizer, model.contract, "", "base")


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_on_a_gpu_rows_are_packed_under_flex_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention runs uncompiled here, and forward only."""
    model = tiny.model(family)
    before = model.lm.config._attn_implementation
    plan = choose(pretend(model, monkeypatch), PLAN._replace(form=MaskForm(added=before == "eager")))
    assert plan == PLAN._replace(packed=True, form=MaskForm(blocks=True))
    assert model.lm.config._attn_implementation == before

    template = model.bind()
    prompts = Prompts(template.passage, template.query, model.pad_id)
    form = MaskForm(added=before == "eager")
    results = []
    for each in (PLAN._replace(form=form), plan):
        use_attention(model.lm, each)
        batch = batch_of(TEXTS, NEXT["some"], prompts, each)
        with torch.no_grad():
            results.append(AdaptModule(model, prompts, each)(batch, batch["counts"])[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-4)
    assert model.lm.config._attn_implementation == "flex_attention"
    restore_attention(model.lm)
    assert model.lm.config._attn_implementation == before


@pytest.mark.filterwarnings("ignore")
def test_a_gpu_on_which_packing_fails_gets_one_text_per_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.model("llama")
    pretended = pretend(model, monkeypatch)

    def fails(*_: Any) -> None:
        raise RuntimeError("out of shared memory\nwhatever")

    monkeypatch.setattr(packing, "_train_once", fails)
    assert choose(pretended) == PLAN
    assert "one text per row, as packed rows are not right here: RuntimeError: out of shared" in capsys.readouterr().err
    assert model.lm.config._attn_implementation == "sdpa"


def test_training_once_finds_dropout_that_attention_refuses() -> None:
    """In evaluation mode it would not show, and the run would stop at its first step."""
    model = tiny.model("llama", attention_dropout=0.1)
    plan = PLAN._replace(packed=True, form=MaskForm(blocks=True))
    use_attention(model.lm, plan)
    with pytest.raises(ValueError, match="does not support `dropout`"):
        packing._train_once(model, model.bind(), plan.form)
    assert not model.lm.training
