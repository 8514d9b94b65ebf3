"""The slow, obvious twin of reranking: every pair in a pass of its own, one query at a time."""

from collections.abc import Mapping, Sequence

import torch

from llara.records import Document, Hit
from llara.reranker import Reranker


def score(model: Reranker, query: str, document: Document) -> float:
    text = f"{document.title} {document.text}" if document.title else document.text
    (row,) = model.bind().rows([query], [text])
    with torch.inference_mode():
        return float(model.lm(input_ids=torch.tensor([row])).logits)


def order(
    hits: Sequence[Hit], scores: Mapping[str, float], depth: int, weight: float = 0.0
) -> list[tuple[str, float | None]]:
    """Ids with their scores, best first; those below the depth have none."""
    new = {hit.document_id: scores[hit.document_id] for hit in hits[:depth]}
    old = {hit.document_id: hit.score for hit in hits[:depth]}
    if weight:
        new = {name: (1 - weight) * part(new, name) + weight * part(old, name) for name in new}
    first = sorted(new.items(), key=lambda item: item[1], reverse=True)
    return [*first, *((hit.document_id, None) for hit in hits[depth:])]


def part(scores: Mapping[str, float], name: str) -> float:
    return (scores[name] - min(scores.values())) / (max(scores.values()) - min(scores.values()))
