"""The slow, obvious twins of the losses: a loop over texts, and all logits at once."""

from collections.abc import Callable, Iterable, Sequence

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
    excluded: Iterable[tuple[int, int]] = (),
    margin: float | None = None,
    relative_margin: float | None = None,
) -> Tensor:
    """`-log(exp(q.p+/t) / sum of exp(q.p/t))`, query by query, over the candidates that are not left out."""
    total = queries.new_zeros(())
    for number, (query, positive) in enumerate(zip(queries, positives, strict=True)):
        own = torch.dot(query, passages[positive])
        scores = []
        for other, passage in enumerate(passages):
            score = torch.dot(query, passage)
            if other != positive:
                if (number, other) in set(excluded):
                    continue
                if margin is not None and score > own - margin:
                    continue
                if relative_margin is not None and score > own - relative_margin * abs(own):
                    continue
            scores.append(score / temperature)
        total = total - (own / temperature - torch.logsumexp(torch.stack(scores), dim=0))
    return total


def kl_divergence(
    queries: Tensor,
    passages: Tensor,
    candidates: Sequence[Sequence[int]],
    teacher: Sequence[Sequence[float]],
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """`sum of p log(p / q)` over each query's candidates, p the teacher's softmax and q the student's."""
    total = queries.new_zeros(())
    for query, numbers, scores in zip(queries, candidates, teacher, strict=True):
        student = torch.stack([torch.dot(query, passages[number]) / temperature for number in numbers]).softmax(dim=0)
        wanted = (queries.new_tensor(scores) / teacher_temperature).softmax(dim=0)
        for p, q in zip(wanted, student, strict=True):
            total = total + p * torch.log(p / q)
    return total


def margin_mse(
    queries: Tensor,
    passages: Tensor,
    candidates: Sequence[Sequence[int]],
    teacher: Sequence[Sequence[float]],
    temperature: float,
) -> Tensor:
    """Each query's mean over its negatives of the squared difference between the student's and teacher's margins."""
    total = queries.new_zeros(())
    for query, (positive, *negatives), (best, *scores) in zip(queries, candidates, teacher, strict=True):
        for negative, score in zip(negatives, scores, strict=True):
            margin = (torch.dot(query, passages[positive]) - torch.dot(query, passages[negative])) / temperature
            total = total + (margin - (best - score)) ** 2 / len(negatives)
    return total


def matryoshka(
    loss: Callable[[Tensor, Tensor], Tensor],
    queries: Tensor,
    passages: Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
) -> Tensor:
    """The weighted sum of a loss over vectors cut to their first dimensions and brought back to unit length."""
    total = queries.new_zeros(())
    for dim, weight in zip(dims, weights, strict=True):
        cut = [torch.stack([row[:dim] / row[:dim].norm() for row in vectors]) for vectors in (queries, passages)]
        total = total + weight * loss(*cut)
    return total
