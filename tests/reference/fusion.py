"""The slow, obvious twins of the fusions: every document against every ranking, in exact fractions."""

from collections.abc import Sequence
from fractions import Fraction

from llara.records import Hit


def documents(rankings: Sequence[Sequence[Hit]]) -> list[str]:
    return sorted({hit.document_id for hits in rankings for hit in hits})


def reciprocal_rank(rankings: Sequence[Sequence[Hit]], weights: Sequence[float], k: float) -> dict[str, float]:
    return {
        document: float(
            sum(
                Fraction(weight) / (Fraction(k) + hit.rank)
                for weight, hits in zip(weights, rankings, strict=True)
                for hit in hits
                if hit.document_id == document
            )
        )
        for document in documents(rankings)
    }


def relative_scores(rankings: Sequence[Sequence[Hit]], weights: Sequence[float]) -> dict[str, float]:
    fused = dict.fromkeys(documents(rankings), Fraction(0))
    for weight, hits in zip(weights, rankings, strict=True):
        scores = {hit.document_id: Fraction(hit.score) for hit in hits}
        for document in scores:
            spread = max(scores.values()) - min(scores.values())
            part = (scores[document] - min(scores.values())) / spread if spread else Fraction(1)
            fused[document] += Fraction(weight) * part
    return {document: float(score) for document, score in fused.items()}
