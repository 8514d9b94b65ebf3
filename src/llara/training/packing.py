"""Whether a run packs several texts into one row: no padding, and attention that skips what lies between texts."""

from typing import Any

import torch

from llara.config import AdaptConfig
from llara.errors import ModelError
from llara.loading import first_line
from llara.masks import BLOCK, Layout, MaskForm, packed_layout, prepared_mask
from llara.model import EmbeddingModel
from llara.parity import Parity, check_packing, check_padding
from llara.progress import note
from llara.templates import BoundTemplate
from llara.training.objective import Plan

FLEX = "flex_attention"


def choose_packing(plan: Plan, model: EmbeddingModel, template: BoundTemplate, config: AdaptConfig) -> Plan:
    """Returns the plan with packed rows where the configuration asks for them and this model does them right.

    On a GPU packed rows run under FlexAttention, whose mask names the blocks that have anything to see; elsewhere under
    a dense mask. The model's attention is left as it was: `use_attention` sets what the plan needs.

    Args:
        plan: How the objective runs; rows are packed only where both branches share them.
        model: In evaluation mode.
        template: Its template.
        config: Asks for `packing`.

    Raises:
        ModelError: Packing was asked for, and would be wrong or fails; says why.
    """
    on_gpu = model.device.type == "cuda"
    if config.packing == "off" or (config.packing == "auto" and not on_gpu):
        return plan
    packed = plan._replace(packed=True)
    if on_gpu:
        packed = packed._replace(form=plan.form._replace(added=False, blocks=True))
    verdict = _try(packed, model, template, config) if plan.shared else Parity(False, "the branches run apart")
    if verdict.one_pass:
        return packed
    if config.packing == "on":
        raise ModelError(f"{config.model}: cannot be trained in packed rows ({verdict.reason}); leave out --packing on")
    if plan.shared:
        note(f"{config.model}: one text per row, as packed rows are not right here: {verdict.reason}")
    return plan


def use_attention(lm: Any, plan: Plan) -> None:
    """Gives a model the attention that a plan's mask is made for; `restore_attention` puts its own back."""
    if plan.form.blocks:
        lm._llara_attention = lm.config._attn_implementation
        lm.set_attn_implementation(FLEX)


def restore_attention(lm: Any) -> None:
    """Gives a model back the attention that it was opened with."""
    if hasattr(lm, "_llara_attention"):
        lm.set_attn_implementation(lm._llara_attention)
        del lm._llara_attention


def _try(plan: Plan, model: EmbeddingModel, template: BoundTemplate, config: AdaptConfig) -> Parity:
    alone = check_padding(model, template, config.chunk_length)
    try:
        use_attention(model.lm, plan)
        verdict = check_packing(model, template, config.chunk_length, plan.form, alone)
        if verdict.one_pass:
            _train_once(model, template, plan.form)
    except Exception as error:  # FlexAttention is compiled, and its compiler raises errors of many kinds
        verdict = Parity(False, f"{type(error).__name__}: {first_line(error)}")
    finally:
        restore_attention(model.lm)
    return verdict


def _train_once(model: EmbeddingModel, template: BoundTemplate, form: MaskForm) -> None:
    """Runs one packed row forward and backward as training does: dropout or the backward pass may be what fails."""
    own, other = len(template.passage.suffix), len(template.query.suffix)
    layout = packed_layout([BLOCK - own - other, 1], own, other)
    layout = Layout(*(each.to(model.device) for each in layout))
    ids = torch.full_like(layout.documents, model.pad_id)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.enable_grad():
        model.lm.train()
        try:
            mask = prepared_mask(layout, form, model.window, model.lm.dtype)
            states = model.trunk(input_ids=ids, attention_mask=mask, position_ids=layout.position_ids)
            torch.autograd.backward(states.float().sum())
        finally:
            model.lm.zero_grad(set_to_none=True)
            model.lm.eval()
