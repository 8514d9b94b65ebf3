from typing import Any
from unittest.mock import ANY

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as flex_integration

from llara import parity
from llara.contract import Contract
from llara.errors import ModelError
from llara.masks import MaskForm
from llara.model import EmbeddingModel
from llara.parity import check_branches, check_head, check_packing, check_padding, probe_length
from llara.templates import RELEASE, Template
from tests import tiny


def check(model: EmbeddingModel, text_length: int = 40) -> Any:
    return check_branches(model, model.bind(), text_length)


PLAIN = [
    "llama",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "phi",
    "opt",
    "qwen2",
    "cohere",
    "granite",
    "gemma",
    "gemma3_text",
    "olmo2",
]


@pytest.mark.parametrize("family", PLAIN)
def test_plain_models_run_in_one_pass(family: str) -> None:
    found = check(tiny.model(family))
    assert found.one_pass
    assert found.form == MaskForm()
    assert "branches of one pass and of two differ by" in found.reason


def test_release_template_of_eight_slots() -> None:
    model = tiny.model("llama", contract=Contract(template=RELEASE, bos=True))
    model.add_missing_tokens()
    assert check(model).one_pass


def test_template_without_bos_or_prefix() -> None:
    assert check(tiny.model("llama", contract=Contract(bos=False)), text_length=1).one_pass


@pytest.mark.parametrize("text_length", [tiny.WINDOW + 1, 40, 200])
def test_sliding_window_that_acts_is_put_into_the_mask(text_length: int) -> None:
    found = check(tiny.model("mistral"), text_length)
    assert found.one_pass
    assert found.form == MaskForm(window="everywhere")


def test_sliding_window_that_no_row_reaches_does_not_act() -> None:
    model = tiny.model("mistral", sliding_window=200)
    assert check(model, text_length=40).form == MaskForm()
    assert check(model, text_length=400).form == MaskForm(window="everywhere")


def test_window_reached_by_the_prompt_alone_is_found() -> None:
    """The text fits the window, text and suffix do not."""
    model = tiny.model("mistral", sliding_window=25)
    template = model.bind()
    assert 20 < 25 < 20 + template.overhead("query")
    assert check(model, text_length=20).form == MaskForm(window="everywhere")


@pytest.mark.parametrize(
    ("family", "added"), [("gemma3_text", False), ("cohere2", False), ("gemma2", True), ("gpt_oss", True)]
)
def test_layers_of_two_kinds_get_a_mask_each(family: str, added: bool) -> None:
    """Some of these layers have a sliding window, others see everything; one has attention with a soft-cap, too."""
    model = tiny.model(family, sliding_window=tiny.WINDOW, layer_types=["sliding_attention", "full_attention"])
    assert check(model, 40) == (True, ANY, MaskForm(added, "by layer"))
    assert check(model, 1).form == MaskForm(added)  # text and suffix together do not reach the window


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_eager_attention_gets_a_mask_to_add(family: str) -> None:
    """It would add a boolean one as 0 and 1, without an error."""
    model = tiny.model(family, attention="eager")
    assert model.lm.config._attn_implementation == "eager"
    assert check(model).form == MaskForm(added=True)
    template = model.bind()
    alone = check_padding(model, template, 40)
    wrong = check_packing(model, template, 40, MaskForm(added=False), alone)
    assert not wrong.one_pass
    assert "differ by" in wrong.reason


def test_soft_cap_of_attention_acts_in_both_ways_of_running() -> None:
    """Gemma 2 caps its attention scores: SDPA cannot, so that a model opened with it would be another model."""
    model = tiny.model("gemma2", attn_logit_softcapping=0.5)
    assert model.lm.config._attn_implementation == "eager"
    assert check(model).one_pass
    uncapped = tiny.model("gemma2", attn_logit_softcapping=None)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        difference = (model.trunk(input_ids=ids) - uncapped.trunk(input_ids=ids)).abs().max()
    assert float(difference) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "mistral"])
def test_packed_texts_equal_each_text_alone(family: str) -> None:
    model = tiny.model(family)
    template = model.bind()
    form = check(model).form
    alone = check_padding(model, template, 40)
    assert check_packing(model, template, 40, form, alone).one_pass
    # The comparison can fail: without the layout's mask, texts of one row see each other.
    blind = EmbeddingModel(model.lm, model.tokenizer, model.contract, "", "blind")
    blind.trunk = lambda **inputs: model.trunk(**{**inputs, "attention_mask": None})  # type: ignore[method-assign]
    assert not check_packing(blind, template, 40, form, alone).one_pass


@pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
def test_flex_attention_under_a_block_mask_equals_each_text_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, since FlexAttention's own CPU kernels are none of our concern, and forward only."""
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    model = tiny.model(family)
    template = model.bind()
    form = check(model).form
    alone = check_padding(model, template, 40)
    model.lm.set_attn_implementation("flex_attention")
    found = check_packing(model, template, 40, form._replace(added=False, blocks=True), alone)
    assert found.one_pass, found.reason


@pytest.mark.parametrize(("family", "reason"), [("bloom", "a prepared mask fails in this model"), ("mpt", "differ by")])
def test_alibi_needs_two_passes(family: str, reason: str) -> None:
    found = check(tiny.model(family))
    assert not found.one_pass
    assert reason in found.reason


@pytest.mark.parametrize("family", ["mistral", "bloom", "mpt", "gemma2", "gpt_oss"])
def test_two_passes_are_right_where_one_is_not(family: str) -> None:
    """Rows of a padded batch, on texts longer than a window, equal each row run by itself."""
    model = tiny.model(family)
    rows = [[0, *range(20, 20 + length), 1] for length in (70, 31, 3)]
    with torch.no_grad():
        together = model.embed(rows, 1, token_budget=10**6)
        for row, found in zip(rows, together, strict=True):
            states = model.lm.base_model(input_ids=torch.tensor([row])).last_hidden_state
            expected = torch.nn.functional.normalize(states[0, -1], dim=-1)
            assert float((found - expected).abs().max()) < 1e-5


def test_model_whose_vectors_depend_on_padding_is_refused() -> None:
    class Bidirectional(EmbeddingModel):
        def trunk(self, **inputs: Tensor | None) -> Tensor:
            states = super().trunk(**inputs)
            return states + states.mean(dim=1, keepdim=True)

    plain = tiny.model("llama")
    model = Bidirectional(plain.lm, plain.tokenizer, plain.contract, "", "looks-ahead")
    with pytest.raises(ModelError, match=r"looks-ahead: its vectors depend on the padding beside a text .*causal"):
        check(model)


# The LM head


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 6.0}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
    ],
)
def test_head_gives_the_logits_of_the_model(family: str, changes: dict[str, Any]) -> None:
    model = tiny.model(family, **changes)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        expected = model.lm(input_ids=ids).logits
        found = model.head(model.trunk(input_ids=ids, attention_mask=None))
        assert float((found - expected).abs().max()) < 1e-5
        if changes:
            bare = model.lm.get_output_embeddings()(model.trunk(input_ids=ids, attention_mask=None))
            assert float((bare - expected).abs().max()) > 0.1
    check_head(model)  # does not refuse


@pytest.mark.parametrize(("family", "bare"), [("llama", True), ("gpt2", True), ("phi", False), ("granite", False)])
def test_a_head_that_is_a_matrix_alone_is_known(family: str, bare: bool) -> None:
    model = tiny.model(family, **({"logits_scaling": 6.0} if family == "granite" else {}))
    states = torch.randn(3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    matrix = model.head_matrix
    assert (matrix is not None) == bare
    if matrix is not None:
        torch.testing.assert_close(states @ matrix.T, model.head(states))


def test_a_head_with_lora_is_no_matrix_alone() -> None:
    model = tiny.model("llama")
    assert model.head_matrix is model.lm.lm_head.weight
    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"]), model.lm)
    assert model.head_matrix is None


def test_unknown_scaling_of_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    forward = type(model.lm).forward

    def scaled(self: Any, *arguments: Any, **named: Any) -> Any:
        output = forward(self, *arguments, **named)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(type(model.lm), "forward", scaled)
    with pytest.raises(ModelError, match=r"tiny llama: its logits are not its LM head .*a scaling that llara does not"):
        check_head(model)


def test_not_a_number_is_no_agreement() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm.base_model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"difference inf"):
        check(model)


def test_probe_goes_beyond_a_window_and_never_beyond_the_job() -> None:
    def length(family: str, text_length: int, **changes: Any) -> int:
        return probe_length(tiny.model(family, **{"max_position_embeddings": 10**6, **changes}), text_length)

    assert length("llama", 96) == 96
    assert length("llama", 100_000) == 1024
    assert length("mistral", 96, sliding_window=4096) == 96
    assert length("mistral", 100_000, sliding_window=4096) == 4104
    assert length("mistral", 100_000, sliding_window=10**6) == 8192


def test_a_window_beyond_the_longest_probe_takes_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the job reach it and those of a probe do not, so that a mask without the window would look right."""
    monkeypatch.setattr(parity, "LONGEST_PROBE", 20)
    model = tiny.model("mistral", sliding_window=30)
    for text_length, reached in ((20, False), (29, True), (200, True)):
        found = check(model, text_length)
        assert found.one_pass is not reached
        assert ("a sliding window of 30 tokens, longer than the 20 that are compared" in found.reason) is reached
    assert check(tiny.model("llama"), 200).one_pass  # no window


def test_probe_leaves_room_for_the_template_where_positions_end() -> None:
    assert probe_length(tiny.model("gpt2", n_positions=40), 100, overhead=7) == 33
    check(tiny.model("gpt2", n_positions=40))
    check_head(tiny.model("gpt2", n_positions=40))


def test_own_template_with_prefix() -> None:
    from llara.templates import EOS, Side

    own = Template("own", Side("Text: ", " query", (EOS,)), Side("Text: ", " passage it is", (EOS, EOS)))
    assert check(tiny.model("qwen3", contract=Contract(template=own, bos=True))).one_pass
