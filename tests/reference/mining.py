"""The slow, obvious twin of mining: one query at a time, every rule on its own, everything in memory."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from llara.records import Document


def same(left: Document, right: Document) -> bool:
    return left.text.lower().split() == right.text.lower().split()


def negatives(
    query_id: str,
    ranked: Sequence[tuple[str, float]],
    relevant: Mapping[str, float | None],
    corpus: Mapping[str, Document],
    *,
    count: int,
    from_rank: int,
    to_rank: int,
    seed: int | None,
    margin: float | None = None,
    relative_margin: float | None = None,
) -> list[tuple[str, float]]:
    """Ids and scores of a query's negatives; `ranked` best first, `seed` None takes the first ones."""
    candidates = [hit for rank, hit in enumerate(ranked, 1) if from_rank <= rank <= to_rank]
    candidates = [hit for hit in candidates if hit[0] not in relevant]
    known = [score for score in relevant.values() if score is not None]
    if margin is not None:
        candidates = [hit for hit in candidates if known and hit[1] <= max(known) - margin]
    if relative_margin is not None:
        assert not known or max(known) > 0
        candidates = [hit for hit in candidates if known and hit[1] <= max(known) * (1 - relative_margin)]
    if seed is not None:
        keys = {name: hashlib.blake2b(f"{seed}\t{query_id}\t{name}".encode(), digest_size=16) for name, _ in candidates}
        candidates = sorted(candidates, key=lambda hit: keys[hit[0]].hexdigest())
    taken: list[Any] = []
    for name, score in candidates:
        others = [*relevant, *(each for each, _ in taken)]
        if len(taken) < count and not any(same(corpus[name], corpus[other]) for other in others):
            taken.append((name, score))
    return taken
