"""Fusion of ranked lists, and the job `fuse`: several runs of the same queries become one.

The functions take the hits of one query, or streams of them, so that the runs are never held in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llara import progress
from llara.config import FuseConfig
from llara.data import Run, rank_hits, write_run
from llara.outputs import check_file_output, save_settings
from llara.records import Hit

Method = Literal["rrf", "relative"]
Fusion = Callable[[str, Sequence[Sequence[Hit]]], list[Hit]]
RANK_CONSTANT = 60


@dataclass(frozen=True)
class FuseResult:
    """What `fuse` wrote; `in_all_runs` counts the queries that every run had."""

    output: Path
    queries: int
    in_all_runs: int
    hits: int


def reciprocal_rank(
    rankings: Sequence[Sequence[Hit]], weights: Sequence[float] | None = None, k: float = RANK_CONSTANT
) -> dict[str, float]:
    """Returns each document's sum over the rankings of `weight / (k + rank)`; ranks count from 1.

    Reciprocal rank fusion (Cormack, Clarke & Buettcher, SIGIR 2009), with k = 60 as they have it. A ranking that lacks
    a document adds nothing for it. `weights` are one per ranking, 1 by default.
    """
    fused: dict[str, float] = {}
    for weight, hits in zip(_weights(rankings, weights), rankings, strict=True):
        for hit in hits:
            fused[hit.document_id] = fused.get(hit.document_id, 0.0) + weight / (k + hit.rank)
    return fused


def relative_scores(rankings: Sequence[Sequence[Hit]], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Returns each document's sum over the rankings of `weight * (score - lowest) / (highest - lowest)`.

    Lowest and highest are those of the ranking: scores of every kind end up between 0 and 1. In a ranking whose scores
    are all equal each counts 1; a document that a ranking lacks counts 0 there, like its last.
    """
    fused: dict[str, float] = {}
    for weight, hits in zip(_weights(rankings, weights), rankings, strict=True):
        lowest, highest = (bound((hit.score for hit in hits), default=0.0) for bound in (min, max))
        for hit in hits:
            part = (hit.score - lowest) / (highest - lowest) if highest > lowest else 1.0
            fused[hit.document_id] = fused.get(hit.document_id, 0.0) + weight * part
    return fused


def _weights(rankings: Sequence[Sequence[Hit]], weights: Sequence[float] | None) -> Sequence[float]:
    return weights if weights else [1.0] * len(rankings)


def fusion(
    method: Method, weights: Sequence[float] | None = None, k: float = RANK_CONSTANT, top_k: int | None = None
) -> Fusion:
    """Returns the function from a query's id and its rankings to its fused hits, at most `top_k` of them."""

    def fuse_hits(query_id: str, rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
        by_rank = method == "rrf"
        scores = reciprocal_rank(rankings, weights, k) if by_rank else relative_scores(rankings, weights)
        return rank_hits(query_id, scores.items())[:top_k]

    return fuse_hits


def fuse_streams(
    streams: Sequence[Iterable[tuple[str, Sequence[Hit]]]], fuse_hits: Fusion
) -> Iterator[tuple[str, list[Hit]]]:
    """Yields each query's id with its fused hits, from streams that hold the same queries in the same order."""
    for parts in zip(*streams, strict=True):
        query_ids = {query_id for query_id, _ in parts}
        assert len(query_ids) == 1, f"the streams have come apart: {query_ids}"
        query_id = parts[0][0]
        yield query_id, fuse_hits(query_id, [hits for _, hits in parts])


def fuse(config: FuseConfig) -> FuseResult:
    """Fuses runs into one. Every query of any of them is in it, in the order of the first run, then of the next ones.

    Memory does not grow with the runs' hits; the order of the queries may differ from run to run.

    Raises:
        ConfigError: The output is also an input.
        DataError: A line of a run that does not fit its format; found before anything is written.
        StorageError: The output cannot be written.
    """
    check_file_output(config.output, config.run)
    with ExitStack() as stack:
        runs = [stack.enter_context(Run(path)) for path in config.run]
        queries = tuple(dict.fromkeys(query_id for run in runs for query_id in run.queries))
        shown = stack.enter_context(progress.Progress("fuse", len(queries), "queries"))
        totals = _Totals()
        fuse_hits = fusion(config.method, config.weights, config.k, config.top_k)
        write_run(config.output, totals.count(_fused(queries, runs, fuse_hits), shown))
    save_settings(config.output, config)
    everywhere = sum(all(query_id in run for run in runs) for query_id in queries)
    return FuseResult(config.output, len(queries), everywhere, totals.hits)


def _fused(queries: Iterable[str], runs: Sequence[Run], fuse_hits: Fusion) -> Iterator[tuple[str, list[Hit]]]:
    for query_id in queries:
        yield query_id, fuse_hits(query_id, [run.hits(query_id) for run in runs])


@dataclass
class _Totals:
    """Counts the hits that pass by."""

    hits: int = 0

    def count(
        self, pairs: Iterable[tuple[str, list[Hit]]], shown: progress.Progress
    ) -> Iterator[tuple[str, list[Hit]]]:
        for query_id, hits in pairs:
            self.hits += len(hits)
            yield query_id, hits
            shown.advance()
