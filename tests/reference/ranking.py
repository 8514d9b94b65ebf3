"""The slow, obvious twins of the indexes: score everything, sort everything."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def order(scores: Sequence[float], ids: Sequence[str], top_k: int) -> list[int]:
    """Positions by score descending, ties by id descending."""
    return sorted(range(len(ids)), key=lambda each: (scores[each], ids[each]), reverse=True)[:top_k]


def inner_products(query: np.ndarray[Any, Any], vectors: np.ndarray[Any, Any]) -> list[float]:
    """Inner products in float64, rounded to float32."""
    return [float(np.float32(math.fsum(np.float64(row) * np.float64(query)))) for row in vectors]


def sparse_products(query: dict[int, float], documents: Sequence[dict[int, float]]) -> list[float]:
    """Inner products of sparse vectors by term, summed exactly and rounded to float32."""
    return [
        float(np.float32(math.fsum(weight * document.get(term, 0.0) for term, weight in query.items())))
        for document in documents
    ]


def bm25(query: str, texts: Sequence[str], k1: float, b: float) -> list[float]:
    """BM25 as Lucene computes it, over lower-cased words of two letters or more; nothing is stemmed or left out."""
    documents = [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(texts)
    for word in re.findall(r"\b\w\w+\b", query.lower()):
        holding = sum(word in document for document in documents)
        if not holding:
            continue
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for number, document in enumerate(documents):
            frequency = document.count(word)
            if frequency:
                scores[number] += idf * frequency / (frequency + k1 * (1 - b + b * len(document) / average))
    return scores


def best_of_passages(scores: Sequence[float], documents: Sequence[int], ids: Sequence[str]) -> list[tuple[int, float]]:
    """Documents with the score of their best passage, by it, ties by id descending."""
    best = {each: max(score for score, of in zip(scores, documents, strict=True) if of == each) for each in documents}
    return sorted(best.items(), key=lambda pair: (pair[1], ids[pair[0]]), reverse=True)
