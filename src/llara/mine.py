"""The job `mine`: hard negatives for training, from an index or a run.

A candidate is a hit of the asked-for ranks that nobody judged relevant. Of these, likely false negatives are left out
by their scores, and exact copies of a relevant document by their texts. Queries pass through in blocks, so that memory
grows with the block and not with the queries.
"""

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from llara import progress
from llara.config import MineConfig
from llara.data import Judged, Run, open_collection, read_judged
from llara.data.collections import refuse_splits
from llara.data.splits import normalise
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import CUT, MANIFEST
from llara.encoding.texts import open_texts
from llara.errors import ConfigError, DataError, StorageError
from llara.files import TEMPORARY, disk_errors, write_atomic
from llara.outputs import check_file_output, save_settings
from llara.ranking import Indexes
from llara.records import Document, Query

Item = TypeVar("Item")

# Queries that are encoded and searched together. No setting: it decides how queries are padded together, and so the
# last digits of their vectors.
_BLOCK = 1024
_TEXTS = 64  # queries whose texts are in memory together


class Scored(NamedTuple):
    """What is known of one query: hits of the asked-for ranks, best first, and the scores of its relevant documents.

    `relevant` holds None where a score is not known. No hit is a relevant document.
    """

    hits: list[tuple[str, float]]
    relevant: dict[str, float | None]


@dataclass(frozen=True)
class MineResult:
    """What `mine` wrote: `incomplete` of the queries have fewer negatives than asked for, `without_negatives` none.

    `left_out` counts queries without a relevant document, queries and candidates without a score of the reranker,
    candidates beyond the margin, and copies.
    """

    output: Path
    queries: int
    negatives: int
    incomplete: int
    without_negatives: int
    left_out: Mapping[str, int]


def mine(config: MineConfig) -> MineResult:
    """Writes one training example per query that has a relevant document: the query, all of these, and hard negatives.

    Which of a query's candidates are taken depends on the seed and the ids alone. A text is never a negative twice.

    Raises:
        ConfigError: Judgements, corpus or model are missing, or the output is an input.
        DataError: A bad row, or a document that the corpus lacks, by file and line; or no negative at all.
        ModelError: Another model than the one that made the index.
        StorageError: A folder that is no index, or is damaged, or a full disk.
    """
    files = (config.queries, config.qrels, config.run, config.scores, *config.corpus)
    made = [path for path in (config.index, *config.corpus) if path is not None and (path / MANIFEST).is_file()]
    check_file_output(config.output, [path for path in files if path is not None], made)
    refuse_splits("--split", config.split, MineConfig.split, [config.qrels or config.queries])
    judged = read_judged(config.queries, config.qrels, config.split)
    with contextlib.ExitStack() as stack:
        scores = stack.enter_context(Run(config.scores)) if config.scores else None
        if scores is not None:
            _check_shared(scores, judged, config)
        source = _open_source(config, judged, stack)
        miner = _Miner(config, judged, source, scores, _open_store(config, judged, source, stack))
        shown = stack.enter_context(progress.Progress("mine", len(judged.queries), "queries"))
        write_atomic(config.output, map(_line, _count(miner.examples(judged.queries, shown), miner.counts, config)))
    save_settings(config.output, config)
    counts = miner.counts
    left_out = {"queries_without_relevant": judged.without} | {name: counts[name] for name in _REASONS}
    return MineResult(
        config.output,
        counts["queries"],
        counts["negatives"],
        counts["incomplete"],
        counts["without_negatives"],
        {name: count for name, count in left_out.items() if count},
    )


def _open_store(config: MineConfig, judged: Judged, source: "_Source", stack: contextlib.ExitStack) -> DocumentStore:
    """Returns where texts are read, which holds every relevant document."""
    corpus = config.corpus
    if not corpus and source.documents is None:
        if open_collection(config.queries) is None:
            raise ConfigError(f"--corpus: is required, neither {config.run} nor {config.queries} brings texts along")
        corpus = (config.queries,)
    if corpus:
        with disk_errors(config.output):
            config.output.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=config.output.parent)
        store = open_texts(corpus, Path(stack.enter_context(made)) / "documents", verify=config.verify)
    else:
        assert source.documents is not None
        store = DocumentStore.open(source.documents)
    relevant = list({each for ids in judged.relevant.values() for each in ids})
    unknown = [each for each, at in zip(relevant, store.find_all(relevant), strict=True) if at < 0]
    if unknown:
        raise judged.unknown(unknown)
    return store


def _count(examples: Iterable["_Example"], counts: Counter[str], config: MineConfig) -> Iterator["_Example"]:
    for example in examples:
        found = len(example.negatives)
        counts.update(queries=1, negatives=found, incomplete=found < config.negatives, without_negatives=not found)
        yield example
    if not counts["negatives"]:
        why = ", ".join(f"{counts[name]:,} {what}" for name, what in _REASONS.items() if counts[name])
        advice = "widen --from-rank and --to-rank, or the margins"
        raise DataError(config.run or config.index or "", None, f"no negative is left ({why or 'no hits'}); {advice}")


_REASONS = {
    "beyond_margin": "beyond the margin",
    "copies": "relevant under another id of the query, or copies of a relevant document",
    "without_scores": "without a score of the reranker",
    "queries_without_scores": "queries without a relevant document that the reranker scored",
}


# Where candidates come from ----------------------------------------------------------------------------------------


class _Source(Protocol):
    @property
    def documents(self) -> Path | None:
        """Where the texts are, if the source knows."""
        ...

    def block(self, queries: Sequence[Query]) -> list[Scored]:
        """Returns what is known of each query."""
        ...

    def lacking(self, query_id: str, document_id: str) -> Exception:
        """Returns the error for a hit whose text is nowhere."""
        ...


class _IndexSource:
    """Searches an index, and scores relevant documents wherever they rank."""

    def __init__(self, config: MineConfig, judged: Judged, folder: Path) -> None:
        self.config, self.judged = config, judged
        self._indexes = Indexes([folder], config)
        (self.index,) = self._indexes.opened
        self.documents: Path | None = folder / self.index.manifest.documents
        self.positions = self._find_relevant()
        if CUT in (self.index.manifest.model or {}):
            progress.note("the index holds passages; a negative is the whole document, which finetune cuts off")

    def block(self, queries: Sequence[Query]) -> list[Scored]:
        texts = [query.text for query in queries]
        (asked,) = self._indexes.encode(texts)
        found = self.index.search(asked, self.config.to_rank)
        relevant = [self.judged.relevant[query.id] for query in queries]
        places = [np.array([self.positions[each] for each in ids], np.int64) for ids in relevant]
        scored = []
        rows = zip(relevant, found.scores, found.positions, self.index.score(asked, places), strict=True)
        for ids, hit_scores, hit_positions, relevant_scores in rows:
            hits = [
                (self.index.ids[position], score)
                for position, score in zip(hit_positions.tolist(), hit_scores.tolist(), strict=True)
                if position >= 0
            ]
            scores: dict[str, float | None] = dict(zip(ids, relevant_scores.tolist(), strict=True))
            scored.append(_within(hits, scores, self.config))
        return scored

    def lacking(self, query_id: str, document_id: str) -> Exception:
        where = self.config.corpus[0] if self.config.corpus else self.documents
        return StorageError(where or "", f"holds no document {document_id!r}, which the index has")

    def _find_relevant(self) -> dict[str, int]:
        wanted = set(itertools.chain.from_iterable(self.judged.relevant.values()))
        ids = ((self.index.ids[position], position) for position in range(len(self.index)))
        found = {document_id: position for document_id, position in ids if document_id in wanted}
        if len(found) < len(wanted):
            raise self.judged.unknown(wanted - found.keys())
        return found


class _RunSource:
    """Reads a run; what it lacks has no score."""

    def __init__(self, config: MineConfig, judged: Judged, run: Run) -> None:
        self.config, self.judged, self.run = config, judged, run
        self.documents: Path | None = None
        _check_shared(run, judged, config)

    def block(self, queries: Sequence[Query]) -> list[Scored]:
        scored = []
        for query in queries:
            hits = [(hit.document_id, hit.score) for hit in self.run.hits(query.id)]
            known = dict(hits)
            relevant = {each: known.get(each) for each in self.judged.relevant[query.id]}
            scored.append(_within(hits[: self.config.to_rank], relevant, self.config))
        return scored

    def lacking(self, query_id: str, document_id: str) -> Exception:
        reason = f"the corpus has no document with the id {document_id!r}"
        return DataError(self.run.path, self.run.line_of(query_id, document_id), reason)


def _check_shared(run: Run, judged: Judged, config: MineConfig) -> None:
    if not any(query.id in run for query in judged.queries):
        raise DataError(run.path, None, f"holds no query of {config.queries} that has a relevant document")


def _within(hits: list[tuple[str, float]], relevant: dict[str, float | None], config: MineConfig) -> Scored:
    return Scored([hit for hit in hits[config.from_rank - 1 :] if hit[0] not in relevant], relevant)


def _open_source(config: MineConfig, judged: Judged, stack: contextlib.ExitStack) -> _IndexSource | _RunSource:
    if config.index is not None:
        return _IndexSource(config, judged, config.index)
    assert config.run is not None, "the configuration checks itself"
    return _RunSource(config, judged, stack.enter_context(Run(config.run)))


# Which candidates are taken ----------------------------------------------------------------------------------------


def ceiling(relevant: Iterable[float | None], margin: float | None, relative_margin: float | None) -> float | None:
    """Returns the score above which a candidate counts as a likely false negative; None where there is no margin.

    `best - margin` or `best - relative_margin * |best|`, whichever is lower, of the best score of a relevant document
    (Moreira et al. 2024, arXiv 2407.15831, call the second, for scores above 0, TopK-PercPos). Where no relevant
    document has a score, all of them rank below every candidate: -infinity.
    """
    if margin is None and relative_margin is None:
        return None
    best = max((score for score in relevant if score is not None), default=None)
    if best is None:
        return -np.inf
    return best - max(margin or 0.0, (relative_margin or 0.0) * abs(best))


def in_order(hits: Sequence[tuple[str, float]], query_id: str, config: MineConfig) -> list[tuple[str, float]]:
    """Returns candidates in the order in which they are taken: as ranked, or at random.

    At random is by a checksum of seed and ids: what else is in the list does not matter, nor does any other query.
    """
    if config.selection == "top":
        return list(hits)

    def key(hit: tuple[str, float]) -> bytes:
        return hashlib.blake2b(f"{config.seed}\t{query_id}\t{hit[0]}".encode(), digest_size=16).digest()

    return sorted(hits, key=key)


@dataclass
class _Example:
    """One query on its way to a line: candidates still to be looked at, and what was found fit so far."""

    query: Query
    relevant: dict[str, float | None]
    candidates: list[tuple[str, float]]
    positives: list[tuple[Document, float | None]] = field(default_factory=list)
    negatives: list[tuple[Document, float]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # texts that no further negative may have


class _Miner:
    """Turns queries into examples, block by block."""

    def __init__(
        self, config: MineConfig, judged: Judged, source: _Source, scores: Run | None, store: DocumentStore
    ) -> None:
        self.config, self.source, self.scores, self.store = config, source, scores, store
        self.elsewhere = judged.elsewhere
        self.counts: Counter[str] = Counter()

    def examples(self, queries: Sequence[Query], shown: progress.Progress) -> Iterator[_Example]:
        for block in _cut(queries, _BLOCK):
            scored = zip(block, self.source.block(block), strict=True)
            opened = [example for query, each in scored if (example := self._open(query, each)) is not None]
            for part in _cut(opened, _TEXTS):
                self._add_positives(part)
                self._add_negatives(part)
                yield from part
            shown.advance(len(block))

    def _open(self, query: Query, found: Scored) -> _Example | None:
        """Returns the query with its candidates in the order in which they are taken; None where it teaches nothing."""
        hits, relevant = found
        if self.scores is not None:
            by_id = {hit.document_id: hit.score for hit in self.scores.hits(query.id)}
            relevant = {each: by_id[each] for each in relevant if each in by_id}
            if not relevant:
                self.counts["queries_without_scores"] += 1
                return None
            self.counts["without_scores"] += sum(document_id not in by_id for document_id, _ in hits)
            hits = [(document_id, by_id[document_id]) for document_id, _ in hits if document_id in by_id]
        highest = ceiling(relevant.values(), self.config.margin, self.config.relative_margin)
        kept = hits if highest is None else [hit for hit in hits if hit[1] <= highest]
        self.counts["beyond_margin"] += len(hits) - len(kept)
        return _Example(query, relevant, in_order(kept, query.id, self.config))

    def _add_positives(self, examples: Sequence[_Example]) -> None:
        elsewhere = {example.query.id: self.elsewhere.get(example.query.id, ()) for example in examples}
        wanted = {each for example in examples for each in (*example.relevant, *elsewhere[example.query.id])}
        found = self.store.get_all(list(wanted))
        for example in examples:
            example.seen.update(_compared(found[each]) for each in elsewhere[example.query.id])
            for document_id, score in example.relevant.items():
                document = found[document_id]
                if (document.title, document.text) not in {(each.title, each.text) for each, _ in example.positives}:
                    example.positives.append((document, score))
                example.seen.add(_compared(document))

    def _add_negatives(self, examples: Sequence[_Example]) -> None:
        open_ = [example for example in examples if example.candidates]
        while open_:
            wanted = [example.candidates[: self.config.negatives - len(example.negatives)] for example in open_]
            found = self.store.get_all(list({document_id for some in wanted for document_id, _ in some}))
            for example, some in zip(open_, wanted, strict=True):
                example.candidates = example.candidates[len(some) :]
                for document_id, score in some:
                    if document_id not in found:
                        raise self.source.lacking(example.query.id, document_id)
                    self._add(example, found[document_id], score)
            open_ = [each for each in open_ if each.candidates and len(each.negatives) < self.config.negatives]

    def _add(self, example: _Example, document: Document, score: float) -> None:
        text = _compared(document)
        if text in example.seen:
            self.counts["copies"] += 1
        else:
            example.seen.add(text)
            example.negatives.append((document, score))


def _cut(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _compared(document: Document) -> str:
    """Returns what makes two documents copies: the text alone, for collections give copies other titles."""
    return normalise(document.text) or normalise(document.title)


# The file ----------------------------------------------------------------------------------------------------------


def _line(example: _Example) -> bytes:
    """Returns an example as a line that `finetune` reads; without scores where a relevant document has none."""
    line: dict[str, Any] = {
        "query_id": example.query.id,
        "query": example.query.text,
        "pos": [_passage(document) for document, _ in example.positives],
        "neg": [_passage(document) for document, _ in example.negatives],
    }
    scores = [score for _, score in example.positives if score is not None]
    if len(scores) == len(example.positives):
        line["pos_scores"] = [_rounded(score) for score in scores]
        line["neg_scores"] = [_rounded(score) for _, score in example.negatives]
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _passage(document: Document) -> dict[str, str]:
    if not document.text.strip():  # then the title is the text, as in encoding
        return {"id": document.id, "text": document.title}
    title = {"title": document.title} if document.title else {}
    return {"id": document.id, **title, "text": document.text}


def _rounded(score: float) -> float:
    """Returns a float32 in its shortest spelling: scores have no more digits than that."""
    return float(str(np.float32(score)))
