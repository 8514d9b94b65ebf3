"""Does one pass over both branches give what two passes give? Asked of every model before it is adapted.

A prepared mask can be wrong without an error: eager attention adds a boolean mask as 0 and 1, a prepared mask switches
sliding windows off, and ALiBi takes its distances from the mask's shape. Comparing is safer than a list of names.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llara.errors import ModelError
from llara.masks import branch_layout
from llara.model import EmbeddingModel, slot_states
from llara.templates import BoundSide, BoundTemplate

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# A probe of 1024 tokens is cheap, and finds local attention that the configuration calls by another name.
USUAL_PROBE, LONGEST_PROBE = 1024, 8192


class Parity(NamedTuple):
    """Whether one pass is right, and the largest relative difference seen (or why it could not run)."""

    one_pass: bool
    reason: str


def probe_length(model: EmbeddingModel, text_length: int) -> int:
    """Returns the length of the probe's text: past a sliding window where the job's rows can reach one.

    A window that no row of the job is longer than never acts, so a longer probe would refuse a model for nothing.
    """
    window = getattr(model.lm.config.get_text_config(), "sliding_window", None)
    beyond = window + 8 if isinstance(window, int) and window > 0 else 0
    return min(text_length, LONGEST_PROBE, max(USUAL_PROBE, beyond))


@torch.no_grad()
def check_branches(model: EmbeddingModel, template: BoundTemplate, text_length: int) -> Parity:
    """Compares both branches of one pass with each branch run alone, on random tokens.

    Args:
        model: In evaluation mode.
        template: Its template, with branches.
        text_length: The longest text that the job will make, in tokens.

    Raises:
        ModelError: Even a branch run alone depends on the padding beside it, so the model cannot be adapted here; or
            its LM head is not the one that its logits come from.
    """
    length = probe_length(model, text_length)
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.lm.config.get_text_config().vocab_size)
    texts = [
        [*template.query.prefix, *torch.randint(vocabulary, (size,), generator=generator).tolist()]
        for size in (length, max(length // 2, 1))
    ]
    alone = {name: [_alone(model, text, side.suffix, side.slots) for text in texts] for name, side in _sides(template)}
    tolerance = TOLERANCE.get(next(model.lm.parameters()).dtype, 1e-1)
    _check_padding(model, template, texts, alone, tolerance)
    _check_head(model, texts[1], tolerance)
    try:
        together = _together(model, template, texts)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return Parity(False, f"a prepared mask fails in this model ({type(error).__name__})")
    worst = max(_difference(together[name], alone[name]) for name in alone)
    return Parity(worst <= tolerance, f"branches of one pass and of two differ by {worst:.1e}")


def _sides(template: BoundTemplate) -> tuple[tuple[str, BoundSide], ...]:
    return ("self", template.passage), ("next", template.query)


def _alone(model: EmbeddingModel, text: list[int], suffix: tuple[int, ...], slots: int) -> Tensor:
    ids = torch.tensor([[*text, *suffix]], device=model.device)
    return model.trunk(input_ids=ids, attention_mask=None)[0, -slots:]


def _together(model: EmbeddingModel, template: BoundTemplate, texts: list[list[int]]) -> dict[str, list[Tensor]]:
    ids, _ = model.pad([[*text, *template.passage.suffix, *template.query.suffix] for text in texts])
    lengths = torch.tensor([len(text) for text in texts], device=model.device)
    layout = branch_layout(lengths, len(template.passage.suffix), len(template.query.suffix), ids.shape[1])
    states = model.trunk(input_ids=ids, attention_mask=layout.mask, position_ids=layout.position_ids)
    return {
        "self": list(slot_states(states, layout.self_end, template.passage.slots)),
        "next": list(slot_states(states, layout.next_end, template.query.slots)),
    }


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest difference relative to the largest expected value; infinite where something is not finite."""
    worst = 0.0
    for left, right in zip(found, expected, strict=True):
        difference = float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def _check_padding(
    model: EmbeddingModel,
    template: BoundTemplate,
    texts: list[list[int]],
    alone: dict[str, list[Tensor]],
    tolerance: float,
) -> None:
    for name, side in _sides(template):
        ids, lengths = model.pad([[*text, *side.suffix] for text in texts])
        states = model.trunk(input_ids=ids, attention_mask=None)
        worst = _difference(list(slot_states(states, lengths, side.slots)), alone[name])
        if not worst <= tolerance:
            raise ModelError(
                f"{model.name}: its vectors depend on the padding beside a text (difference {worst:.1e}), "
                "so it cannot be trained in batches here; is it a causal decoder?"
            )


def _check_head(model: EmbeddingModel, text: list[int], tolerance: float) -> None:
    ids = torch.tensor([text], device=model.device)
    expected = model.lm(input_ids=ids, use_cache=False).logits[0, -1:].float()
    found = model.head(model.trunk(input_ids=ids, attention_mask=None)[0, -1:]).float()
    worst = _difference([found], [expected])
    if not worst <= tolerance:
        raise ModelError(
            f"{model.name}: its logits are not its LM head on its last hidden state (difference {worst:.1e}); "
            "a scaling that llara does not know of stands between them"
        )
