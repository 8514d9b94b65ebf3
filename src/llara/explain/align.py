"""How far the view can be trusted: whether embeddings of a sample name their own texts better than other ones.

Shapes: n texts, K slots, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llara.errors import DataError
from llara.lexical import TermReader, read_slots
from llara.losses.adapt import set_recall
from llara.model import EmbeddingModel, OnBatch
from llara.templates import SideName

LEAST_GAIN = 0.03  # of what chance leaves to be named; `mini`, never adapted, has 0.00, and 0.02 without its component
SIGMAS = 2.0  # a difference within so many standard errors may be none


class Slots(NamedTuple):
    """Texts after their forward pass: slots [n, K, D] in float32 on the CPU, and their own token ids."""

    slots: Tensor
    own: list[Sequence[int]]


@dataclass(frozen=True)
class Alignment:
    """How well passages name their own terms.

    Attributes:
        recall: Of a text's n terms, the share among the n largest that its embedding says; mean over the texts.
        chance: The same of another text's terms: what an embedding says that has nothing to do with its text.
        error: Standard error of the difference between the two.
        texts: How many were measured.
        source: Where they came from.
    """

    recall: float
    chance: float
    error: float
    texts: int
    source: str

    @property
    def gain(self) -> float:
        """The recall beyond chance, as a share of what chance leaves: 0 at chance, 1 where every term is named."""
        return (self.recall - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0

    @property
    def near_chance(self) -> bool:
        """Whether the terms say hardly more of the text that they were read from than of any other."""
        return self.gain < LEAST_GAIN or self.recall - self.chance < SIGMAS * self.error


def collect(
    model: EmbeddingModel, texts: Sequence[str], side: SideName, token_budget: int | None, on_batch: OnBatch | None
) -> Slots:
    """Runs a sample of texts through the model and keeps what stands at their slots."""
    found: list[tuple[Tensor, Sequence[int]]] = [(torch.empty(0), ())] * len(texts)
    for part in read_slots(model, texts, side, token_budget, None, on_batch):
        for number, slots, own in zip(part.numbers, part.slots.float().cpu(), part.own, strict=True):
            found[number] = slots, own
    return Slots(torch.stack([slots for slots, _ in found]), [own for _, own in found])


def first_component(slots: Tensor) -> tuple[Tensor, float]:
    """Returns the first principal component of embeddings, float32 [D] of unit length, and its share of their energy.

    The embeddings are the means of the slots [n, K, D], not centred and not normalised, and the component is the first
    right singular vector of their matrix, as the authors of arXiv 2406.17378 compute it. Its share is
    `s_1^2 / sum s_i^2`.
    """
    embeddings = slots.double().mean(dim=1)
    _, values, directions = torch.linalg.svd(embeddings, full_matrices=False)
    return directions[0].float(), float(values[0] ** 2 / (values**2).sum())


def measure(reader: TermReader, sample: Slots, source: str) -> Alignment:
    """Measures the alignment on a sample of passages.

    Raises:
        DataError: Fewer than two texts of the sample have a term.
    """
    terms = [reader.own_terms(own) for own in sample.own]
    numbers = [number for number, each in enumerate(terms) if each]
    if len(numbers) < 2:
        raise DataError(source, None, f"{len(numbers)} texts with a term, and the alignment takes two or more")
    # Half the sample away: neighbours in a corpus are often of one subject.
    away = len(numbers) // 2
    others = {number: numbers[(place + away) % len(numbers)] for place, number in enumerate(numbers)}
    slots = sample.slots[numbers].to(reader.model.device, next(reader.model.lm.parameters()).dtype)
    found = []
    for span in reader.spans(slots):
        for number, logits in zip(numbers[span], reader.logits(slots[span]), strict=True):
            found.append([_recall(logits, terms[number]), _recall(logits, terms[others[number]])])
    own, other = np.array(found).T
    error = float(np.std(own - other, ddof=1) / math.sqrt(len(found)))
    return Alignment(float(own.mean()), float(other.mean()), error, len(found), source)


def _recall(logits: Tensor, terms: Sequence[int]) -> float:
    ids = torch.tensor(terms, device=logits.device)
    return float(set_recall(logits[None], torch.zeros_like(ids), ids)[0])
