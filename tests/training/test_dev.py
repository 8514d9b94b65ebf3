"""Measuring on held-out examples: which pool, and nDCG and MRR as their definitions have them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llara.model import EmbeddingModel
from llara.training.contrast import ContrastModule, ContrastSource
from llara.training.dev import DevMeasure, make_pool, ranked
from tests import tiny
from tests.training.examples import draw_of, row, sets_of, settings
from tests.training.helpers import WORDS

DEV = (Path("dev"),)


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model()


def slow_ranked(scores: list[float], relevant: list[int]) -> tuple[float, float]:
    """Sorts all passages, irrelevant ones first among equals, and adds up the gains of the first ten."""
    order = sorted(range(len(scores)), key=lambda passage: (-scores[passage], passage in relevant))[:10]
    gains = [1 / math.log2(rank + 1) for rank, passage in enumerate(order, start=1) if passage in relevant]
    best = [1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), 10) + 1)]
    first = [1 / rank for rank, passage in enumerate(order, start=1) if passage in relevant]
    return sum(gains) / sum(best), first[0] if first else 0.0


def test_ranks_equal_those_of_sorting() -> None:
    rng = np.random.default_rng(0)
    for passages in (1, 5, 40):
        scores = rng.integers(0, 6, size=(30, passages)).astype(np.float32)  # few values, so that many are equal
        relevant = [
            rng.choice(passages, size=int(rng.integers(1, min(passages, 13) + 1)), replace=False).tolist()
            for _ in range(30)
        ]
        expected = [slow_ranked(line.tolist(), own) for line, own in zip(scores, relevant, strict=True)]
        assert ranked(torch.from_numpy(scores), relevant) == pytest.approx(np.array(expected))


def dev_rows(count: int, letter: str = "d") -> list[dict[str, object]]:
    return [row(f"{letter}q{i}", [f"{letter}p{i}", "common"], [f"{letter}n{i}"]) for i in range(count)]


def test_a_pool_holds_the_queries_own_passages_then_those_of_other_examples(tmp_path: Path) -> None:
    train, dev = sets_of(tmp_path, dev_rows(30, "t"), dev_rows(6))
    config = settings(dev=DEV, dev_queries=4, dev_passages=20)
    pool = make_pool([dev], [train], config, tiny.model().contract)
    queries, passages = [text for _, text in pool.queries], [text for _, text in pool.passages]
    assert len(queries) == 4 and len(set(passages)) == len(passages) == 20
    numbers = [query[2] for query in queries]
    own = {"common", *(f"dp{i}" for i in numbers), *(f"dn{i}" for i in numbers)}
    assert set(passages[: len(own)]) == own
    assert set(passages[len(own) : len(own) + 2]) == {f"dp{i}" for i in range(6)} - own  # of dev, then of train
    assert all(text[0] == "t" for text in passages[len(own) + 2 :])
    found = {(queries[query], passages[passage]) for query, passage in pool.relevant.T.tolist()}
    assert found == {(f"dq{i}", f"dp{i}") for i in numbers} | {(f"dq{i}", "common") for i in numbers}
    assert [passages[place] for place in pool.positives.tolist()] == [f"dp{i}" for i in numbers]
    again = make_pool([dev], [train], config, tiny.model().contract)
    assert (again.queries, again.passages) == (pool.queries, pool.passages)
    other = make_pool([dev], [train], settings(dev=DEV, dev_queries=4, dev_passages=20, seed=1), tiny.model().contract)
    assert other.queries != pool.queries


def test_rows_of_one_query_are_one_query_with_all_their_positives(tmp_path: Path) -> None:
    """Pairs and triples have a row for each relevant passage; none of them is wrong for the query."""
    rows = [row("same", ["first"]), row("other", ["third"]), row("same", ["second"], ["negative"])]
    train, dev = sets_of(tmp_path, dev_rows(3, "t"), rows)
    for seed in range(4):
        pool = make_pool([dev], [train], settings(dev=DEV, dev_queries=1, seed=seed), tiny.model().contract)
        ((_, query),) = pool.queries
        found = {pool.passages[passage][1] for _, passage in pool.relevant.T.tolist()}
        assert found == ({"first", "second"} if query == "same" else {"third"})
    pool = make_pool([dev], [train], settings(dev=DEV, dev_queries=8), tiny.model().contract)
    assert sorted(query for _, query in pool.queries) == ["other", "same"]


def test_a_pool_is_no_larger_than_what_there_is(tmp_path: Path) -> None:
    train, dev = sets_of(tmp_path, dev_rows(3, "t"), dev_rows(3))
    pool = make_pool([dev], [train], settings(dev=DEV, dev_passages=1000), tiny.model().contract)
    assert 7 <= len(pool.passages) <= 13
    few = make_pool([dev], [train], settings(dev=DEV, dev_passages=2), tiny.model().contract)
    assert len(few.passages) == 7, "the queries' own passages are all in"


def test_a_measurement_equals_single_encodings(tmp_path: Path, model: EmbeddingModel) -> None:
    rows = [row(f"why {WORDS[i]} {i}", [f"the sky {WORDS[i]} {i}", "read"], [f"a file {i}"]) for i in range(6)]
    train, dev = sets_of(tmp_path, dev_rows(5, "t"), rows)
    config = settings(dev=DEV, token_budget=60, dev_queries=5, temperature=0.2)
    pool = make_pool([dev], [train], config, model.contract)
    source = ContrastSource(draw_of([train]), model, config)
    found = DevMeasure(pool, source, config)(ContrastModule(model, config))
    queries, passages = (
        torch.from_numpy(np.concatenate([model.encode([text], side).numpy() for _, text in texts]))
        for side, texts in (("query", pool.queries), ("passage", pool.passages))
    )
    loss, metrics = 0.0, np.zeros(2)
    for number, scores in enumerate(queries @ passages.T):
        own = [passage for query, passage in pool.relevant.T.tolist() if query == number]
        positive = int(pool.positives[number])
        kept = [place for place in range(len(scores)) if place == positive or place not in own]
        loss -= float(torch.log_softmax(scores[kept] / 0.2, dim=0)[kept.index(positive)])
        metrics += np.array(slow_ranked(scores.tolist(), own))
    assert found["dev_loss"] == pytest.approx(loss / 5, rel=1e-4)
    assert [found["dev_ndcg"], found["dev_mrr"]] == pytest.approx((metrics / 5).tolist(), rel=1e-4)
