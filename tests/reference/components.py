"""The slow, obvious twin of `explain/align.py`: a component by power iteration, an alignment by sorting."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def first_component(slots: Floats, rounds: int = 2000) -> tuple[Floats, float]:
    """Returns the direction that holds most of the squared length of the mean slots, and its share of it."""
    embeddings = slots.mean(axis=1)
    direction = np.random.default_rng(0).normal(size=embeddings.shape[1])
    for _ in range(rounds):
        direction = embeddings.T @ (embeddings @ direction)
        direction /= np.linalg.norm(direction)
    return direction, float(((embeddings @ direction) ** 2).sum() / (embeddings**2).sum())


def recall(logits: Sequence[float], terms: set[int]) -> float:
    """Returns the share of n terms among the n largest logits."""
    largest = sorted(range(len(logits)), key=lambda token: -logits[token])[: len(terms)]
    return len(terms & set(largest)) / len(terms)
