"""The reranker's objective beside its formula, list by list."""

import math

import pytest
import torch

from llara.losses.listwise import listwise_softmax


def slow(lists: list[list[float]]) -> float:
    return sum(math.log(sum(math.exp(score) for score in scores)) - scores[0] for scores in lists)


def padded(lists: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, lists))
    scores = torch.tensor([[*row, *[7.0] * (width - len(row))] for row in lists])  # what fills up must not matter
    return scores, torch.tensor([[place < len(row) for place in range(width)] for row in lists])


@pytest.mark.parametrize(
    "lists", [[[0.5, -1.0, 2.0], [3.0, 0.0], [1.0]], [[1.0]], [[30.0, -30.0], [-30.0, 30.0, 29.0]]], ids=str
)
def test_loss_is_the_sum_of_the_formula(lists: list[list[float]]) -> None:
    assert listwise_softmax(*padded(lists)).item() == pytest.approx(slow(lists), rel=1e-5, abs=1e-6)


def test_gradients_are_those_of_the_formula_and_finite() -> None:
    scores, there = padded([[0.5, -1.0, 2.0], [3.0, 0.0], [1.0]])
    scores.requires_grad_(True)
    listwise_softmax(scores, there).backward()
    shares = [row[: int(mask.sum())].softmax(dim=0) for row, mask in zip(scores.detach(), there, strict=True)]
    expected = torch.zeros_like(scores)
    for row, share in enumerate(shares):
        expected[row, : len(share)] = share
        expected[row, 0] -= 1
    assert scores.grad is not None
    assert torch.allclose(scores.grad, expected, atol=1e-6)
    assert scores.grad[~there].abs().max() == 0 and scores.grad[2].abs().max() == 0


def test_lower_precision_is_summed_in_float32() -> None:
    scores, there = padded([[0.5, -1.0, 2.0], [3.0, 0.0]])
    assert listwise_softmax(scores.half(), there).dtype == torch.float32


def test_sums_over_parts_are_the_whole() -> None:
    scores, there = padded([[0.5, -1.0, 2.0], [3.0, 0.0], [1.0, 2.0, 3.0]])
    parts = listwise_softmax(scores[:1], there[:1]) + listwise_softmax(scores[1:], there[1:])
    assert listwise_softmax(scores, there).item() == pytest.approx(parts.item(), rel=1e-6)
