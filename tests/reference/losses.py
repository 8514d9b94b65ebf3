"""The slow, obvious twins of the losses: a loop over texts, and all logits at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def token_set_loss(
    slot_states: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Sequence[Sequence[int]],
    token_weights: Sequence[float] | None = None,
) -> Tensor:
    """Sum over texts of the weighted mean over targets of `-log_softmax(max over slots of head(h))`."""
    total = slot_states.new_zeros(())
    for states, wanted in zip(slot_states, targets, strict=True):
        weights = [1.0 if token_weights is None else token_weights[token] for token in wanted]
        if not sum(weights):
            continue
        logits = torch.stack([head(state) for state in states]).max(dim=0).values
        log_probabilities = torch.log_softmax(logits, dim=-1)
        for token, weight in zip(wanted, weights, strict=True):
            total = total - log_probabilities[token] * weight / sum(weights)
    return total


def language_model_loss(states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Summed cross-entropy, one token after the other."""
    total = states.new_zeros(())
    for state, label in zip(states, labels.tolist(), strict=True):
        total = total - torch.log_softmax(head(state), dim=-1)[label]
    return total


def info_nce(
    queries: Tensor,
    passages: Tensor,
    positives: Sequence[int],
    temperature: float,
    excluded: Sequence[Sequence[bool]] | None = None,
) -> Tensor:
    """`-log(exp(q.p+/t) / sum of exp(q.p/t))`, query by query, over the candidates that are not excluded."""
    total = queries.new_zeros(())
    for number, (query, positive) in enumerate(zip(queries, positives, strict=True)):
        candidates = [
            passage
            for other, passage in enumerate(passages)
            if other == positive or excluded is None or not excluded[number][other]
        ]
        scores = torch.stack([torch.dot(query, passage) / temperature for passage in candidates])
        total = total - (torch.dot(query, passages[positive]) / temperature - torch.logsumexp(scores, dim=0))
    return total
