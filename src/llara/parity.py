"""Does one pass over both branches give what two passes give? Asked of every model before it is adapted.

A prepared mask can be wrong without an error: eager attention adds a boolean mask as 0 and 1, a prepared mask switches
sliding windows off, and ALiBi takes its distances from the mask's shape. Comparing is safer than a list of names, and
finds out, too, in which form a model takes a mask.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llara.errors import ModelError
from llara.masks import Layout, MaskForm, branch_layout, packed_layout, prepared_mask
from llara.model import EmbeddingModel
from llara.pooling import slot_states
from llara.templates import BoundSide, BoundTemplate

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# A probe of 1024 tokens is cheap, and finds local attention that the configuration calls by another name.
USUAL_PROBE, LONGEST_PROBE = 1024, 8192
BEYOND = 8  # tokens of a probe past a window


class Parity(NamedTuple):
    """Whether one pass is right, the largest relative difference seen (or why it could not run), and under which mask.

    A model that takes masks in no form that is known here runs in two passes.
    """

    one_pass: bool
    reason: str
    form: MaskForm = MaskForm()


def probe_length(model: EmbeddingModel, text_length: int, overhead: int = 0) -> int:
    """Returns the length of the probe's text: past a sliding window where the job's rows can reach one.

    A window that no row of the job is longer than never acts, so a longer probe would refuse a model for nothing.
    """
    beyond = model.window + BEYOND if model.window else 0
    return max(min(_longest_text(model, text_length, overhead), LONGEST_PROBE, max(USUAL_PROBE, beyond)), 2)


def _longest_text(model: EmbeddingModel, text_length: int, overhead: int) -> int:
    """Returns the longest text that the job can make: what the template adds has room below the model's positions."""
    return min(text_length, (model.positions or text_length + overhead) - overhead)


def _unseen_window(model: EmbeddingModel, text_length: int, overhead: int) -> Parity | None:
    """Returns why a comparison would tell nothing: a window that the job's rows reach, and those of a probe do not."""
    longest = _longest_text(model, text_length, overhead) + overhead
    seen = probe_length(model, text_length, overhead) + overhead
    if not model.window or longest <= model.window or seen >= min(longest, model.window + BEYOND):
        return None
    reason = f"a sliding window of {model.window:,} tokens, longer than the {LONGEST_PROBE:,} that are compared"
    return Parity(False, reason)


@torch.no_grad()
def check_branches(model: EmbeddingModel, template: BoundTemplate, text_length: int) -> Parity:
    """Compares both branches of one pass with each branch run alone, on random tokens.

    Args:
        model: In evaluation mode.
        template: Its template, with branches.
        text_length: The longest text that the job will make, in tokens.

    Raises:
        ModelError: Even a branch run alone depends on the padding beside it, so the model cannot be adapted here.
    """
    alone = check_padding(model, template, text_length)
    if unseen := _unseen_window(model, text_length, _overhead(template)):
        return unseen
    texts = _texts(model, template.query.prefix, text_length, _overhead(template))
    verdicts = [_compare(model, template, texts, alone, form, packed=False) for form in mask_forms(model)]
    return next((verdict for verdict in verdicts if verdict.one_pass), verdicts[0])


@torch.no_grad()
def check_packing(
    model: EmbeddingModel, template: BoundTemplate, text_length: int, form: MaskForm, alone: dict[str, list[Tensor]]
) -> Parity:
    """Compares several texts in one row with each branch run alone.

    Args:
        model: In evaluation mode, with the attention that packed rows are to run under.
        template: Its template, with branches.
        text_length: As for `check_branches`.
        form: The mask of packed rows.
        alone: What `check_padding` returned, under the attention that the model came with.
    """
    texts = _texts(model, template.query.prefix, text_length, _overhead(template))
    return _compare(model, template, texts, alone, form, packed=True)


def mask_forms(model: EmbeddingModel) -> Iterator[MaskForm]:
    """Yields the forms in which this model may take a prepared mask, the plainest first."""
    added = model.lm.config._attn_implementation == "eager"
    yield MaskForm(added)
    if model.window:
        yield MaskForm(added, "everywhere")
        yield MaskForm(added, "by layer")


def _compare(
    model: EmbeddingModel,
    template: BoundTemplate,
    texts: list[list[int]],
    alone: dict[str, list[Tensor]],
    form: MaskForm,
    *,
    packed: bool,
) -> Parity:
    try:
        together = (_packed if packed else _together)(model, template, texts, form)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
        return Parity(False, f"a prepared mask fails in this model ({type(error).__name__})", form)
    worst = max(_difference(together[name], alone[name]) for name in alone)
    return Parity(worst <= _tolerance(model), f"branches of one pass and of two differ by {worst:.1e}", form)


@torch.no_grad()
def check_padding(model: EmbeddingModel, template: BoundTemplate, text_length: int) -> dict[str, list[Tensor]]:
    """Compares texts in one padded batch with each text alone; returns the slots' states alone, by branch.

    Raises:
        ModelError: They differ, so the model's vectors would depend on what else is in a batch.
    """
    alone = {}
    for name, side in _sides(template):
        texts = _texts(model, side.prefix, text_length, _overhead(template))
        rows = [[*text, *side.suffix] for text in texts]
        alone[name] = [_alone(model, row, side.slots) for row in rows]
        ids, lengths = model.pad(rows)
        states = model.trunk(input_ids=ids, attention_mask=None)
        _refuse_dependence(model, _difference(list(slot_states(states, lengths, side.slots)), alone[name]))
    return alone


@torch.no_grad()
def check_vectors(model: EmbeddingModel, template: BoundTemplate, text_length: int) -> None:
    """Compares the vectors of texts in one padded batch with those of each text alone.

    Raises:
        ModelError: They differ.
    """
    for _, side in _sides(template):
        texts = _texts(model, side.prefix, text_length, _overhead(template))
        rows = [[*text, *side.suffix] for text in texts]
        alone = [model.embed([row], side.slots)[0] for row in rows]
        together = model.embed(rows, side.slots, token_budget=sys.maxsize)
        _refuse_dependence(model, _difference(list(together), alone))


def _refuse_dependence(model: EmbeddingModel, worst: float) -> None:
    if not worst <= _tolerance(model):
        raise ModelError(
            f"{model.name}: its vectors depend on the padding beside a text (difference {worst:.1e}), "
            f"so it cannot be run in batches here{'; is it a causal decoder?' if model.contract.causal else ''}"
        )


def check_direction(model: EmbeddingModel) -> None:
    """Checks that positions see what the model's contract says: what stands before them, or all but padding.

    Raises:
        ModelError: They do not.
    """
    (check_causal if model.contract.causal else check_encoder)(model)


@torch.no_grad()
def check_encoder(model: EmbeddingModel) -> None:
    """Compares the states of a text's first tokens with those that they have before other tokens, and before padding.

    Raises:
        ModelError: A position sees nothing of what stands after it, or sees padding, or the model takes no mask at all.
    """
    rows = int(model.lm.get_input_embeddings().weight.shape[0])
    text = torch.arange(3, 27, device=model.device) % rows
    one, other = text[None, :16], torch.cat([text[:8], text[16:]])[None]
    whole, half = (torch.tensor([length], device=model.device) for length in (16, 8))
    try:
        first, second = model.states(one, whole)[0, :8], model.states(other, whole)[0, :8]
        alone, padded = model.states(one[:, :8], half)[0], model.states(one, half)[0, :8]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{model.name}: takes no token ids with a mask, as an encoder of text does ({type(error).__name__})"
        ) from error
    if torch.equal(first, second):  # to the bit: under causal attention nothing has changed for them
        raise ModelError(
            f"{model.name}: its positions see nothing of what stands after them, so it is a causal decoder, and "
            f"template {model.contract.template.name!r} is for encoders"
        )
    _refuse_dependence(model, _difference([padded], [alone]))


@torch.no_grad()
def check_causal(model: EmbeddingModel) -> None:
    """Compares the states of a text's first tokens with those that they have when more tokens follow.

    Raises:
        ModelError: They differ, so a position sees what stands after it, and a text's vector would depend on padding.
    """
    rows = int(model.lm.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(3, 19, device=model.device) % rows)[None]
    states = model.trunk(input_ids=ids, attention_mask=None)[0]
    difference = _difference([model.trunk(input_ids=ids[:, :8], attention_mask=None)[0]], [states[:8]])
    if not difference <= _tolerance(model):
        raise ModelError(
            f"{model.name}: its positions see what stands after them (difference {difference:.1e}), "
            "as an encoder's do; llara takes causal decoders"
        )


@torch.no_grad()
def check_head(model: EmbeddingModel) -> None:
    """Compares `model.head` on the last hidden state with the logits that the model itself gives.

    Raises:
        ModelError: They differ: something that llara does not know of stands between the two.
    """
    ids = torch.tensor([_texts(model, (), USUAL_PROBE)[1]], device=model.device)
    expected = model.lm(input_ids=ids, use_cache=False).logits[0, -1:].float()
    found = model.head(model.trunk(input_ids=ids, attention_mask=None)[0, -1:]).float()
    worst = _difference([found], [expected])
    if not worst <= _tolerance(model):
        raise ModelError(
            f"{model.name}: its logits are not its LM head on its last hidden state (difference {worst:.1e}); "
            "a scaling that llara does not know of stands between them"
        )


def _overhead(template: BoundTemplate) -> int:
    return max(template.query.overhead, template.passage.overhead)


def _texts(model: EmbeddingModel, prefix: Sequence[int], text_length: int, overhead: int = 0) -> list[list[int]]:
    """Returns two rows of random tokens, a long one and one of half its length; the same ones at every call."""
    length = probe_length(model, text_length, overhead)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.lm.config.get_text_config().vocab_size)
    sizes = (length, max(length // 2, 1))
    return [[*prefix, *torch.randint(vocabulary, (size,), generator=generator).tolist()] for size in sizes]


def _tolerance(model: EmbeddingModel) -> float:
    return TOLERANCE.get(next(model.lm.parameters()).dtype, 1e-1)


def _sides(template: BoundTemplate) -> tuple[tuple[str, BoundSide], ...]:
    return ("self", template.passage), ("next", template.query)


def _alone(model: EmbeddingModel, row: list[int], slots: int) -> Tensor:
    return model.trunk(input_ids=torch.tensor([row], device=model.device), attention_mask=None)[0, -slots:]


def _together(
    model: EmbeddingModel, template: BoundTemplate, texts: list[list[int]], form: MaskForm
) -> dict[str, list[Tensor]]:
    ids, _ = model.pad([[*text, *template.passage.suffix, *template.query.suffix] for text in texts])
    lengths = torch.tensor([len(text) for text in texts], device=model.device)
    layout, self_end, next_end = branch_layout(
        lengths, len(template.passage.suffix), len(template.query.suffix), ids.shape[1]
    )
    states = _run(model, ids, layout, form)
    return {
        "self": list(slot_states(states, self_end, template.passage.slots)),
        "next": list(slot_states(states, next_end, template.query.slots)),
    }


def _packed(
    model: EmbeddingModel, template: BoundTemplate, texts: list[list[int]], form: MaskForm
) -> dict[str, list[Tensor]]:
    own, other = len(template.passage.suffix), len(template.query.suffix)
    layout = Layout(*(each.to(model.device) for each in packed_layout([len(text) for text in texts], own, other)))
    row = [token for text in texts for token in (*text, *template.passage.suffix, *template.query.suffix)]
    row += [model.pad_id] * (layout.documents.shape[1] - len(row))
    states = _run(model, torch.tensor([row], device=model.device), layout, form)[0]
    found: dict[str, list[Tensor]] = {"self": [], "next": []}
    end = 0
    for text in texts:
        end += len(text) + own + other
        found["self"].append(states[end - other - template.passage.slots : end - other])
        found["next"].append(states[end - template.query.slots : end])
    return found


def _run(model: EmbeddingModel, ids: Tensor, layout: Layout, form: MaskForm) -> Tensor:
    mask = prepared_mask(layout, form, model.window, model.lm.dtype)
    return model.trunk(input_ids=ids, attention_mask=mask, position_ids=layout.position_ids)


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest difference relative to the largest expected value; infinite where something is not finite."""
    worst = 0.0
    for left, right in zip(found, expected, strict=True):
        difference = float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst
