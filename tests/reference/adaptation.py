"""The slow, obvious twin of `training/objective.py`: text by text, branch by branch, with all logits of a row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llara.model import EmbeddingModel
from llara.templates import BoundSide


def branch_loss(model: EmbeddingModel, text: Sequence[int], side: BoundSide, targets: Sequence[int]) -> Tensor:
    """Returns `-mean over targets of log_softmax(max over the slots of the logits)` for one text."""
    row = [*side.prefix, *text, *side.suffix]
    logits = model.lm(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    joined = torch.stack([logits[len(row) - 1 - slot] for slot in range(side.slots)]).max(dim=0).values
    log_probabilities = torch.log_softmax(joined, dim=-1)
    return -sum((log_probabilities[token] for token in targets), start=torch.zeros(())) / len(targets)


def branch_recall(model: EmbeddingModel, text: Sequence[int], side: BoundSide, targets: Sequence[int]) -> float:
    """Returns the share of a text's target set among as many likeliest tokens at its slots."""
    row = [*side.prefix, *text, *side.suffix]
    logits = model.lm(input_ids=torch.tensor([row]), use_cache=False).logits[0, len(row) - side.slots :]
    joined = logits.max(dim=0).values.tolist()
    likeliest = sorted(range(len(joined)), key=lambda token: -joined[token])[: len(set(targets))]
    return len(set(likeliest) & set(targets)) / len(set(targets))


def text_loss(model: EmbeddingModel, prefix: Sequence[int], text: Sequence[int]) -> tuple[Tensor, int]:
    """Returns the summed cross-entropy of a text's tokens that have something before them, and their number."""
    row = [*prefix, *text]
    log_probabilities = torch.log_softmax(model.lm(input_ids=torch.tensor([row]), use_cache=False).logits[0], dim=-1)
    positions = [position for position in range(len(prefix), len(row)) if position > 0]
    total = torch.zeros(())
    for position in positions:
        total = total - log_probabilities[position - 1, row[position]]
    return total, len(positions)


def adaptation_loss(
    model: EmbeddingModel,
    texts: Sequence[Sequence[int]],
    next_texts: Sequence[Sequence[int]],
    sides: dict[str, BoundSide],
    branches: Sequence[str],
    *,
    unique: bool,
    loss_scale: float,
    lm_weight: float,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the loss of one step, and the means behind it by branch (`self`, `next`, `lm`)."""
    means: dict[str, Tensor] = {}
    for branch in branches:
        wanted = texts if branch == "self" else next_texts
        losses = []
        for text, target in zip(texts, wanted, strict=True):
            tokens = sorted(set(target)) if unique else list(target)
            if tokens:
                losses.append(branch_loss(model, text, sides[branch], tokens))
        if losses:
            means[branch] = torch.stack(losses).mean()
    loss = torch.zeros(())
    if means:
        loss = loss_scale * torch.stack(list(means.values())).mean()
    if lm_weight:
        parts = [text_loss(model, sides["self"].prefix, text) for text in texts]
        means["lm"] = torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)
        loss = loss + lm_weight * means["lm"]
    return loss, {name: float(value.detach()) for name, value in means.items()}
