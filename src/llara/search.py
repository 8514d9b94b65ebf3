"""The job `search`: queries become a run, or one query its hits with their texts; one index is asked, or several."""

import collections
import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llara import progress
from llara.config import SearchConfig
from llara.data import read_queries, write_run
from llara.encoding.documents import DocumentStore
from llara.errors import ConfigError, DataError, StorageError
from llara.fuse import fusion
from llara.index.faiss import Effort
from llara.outputs import check_file_output, save_settings
from llara.ranking import Indexes, Ranked, fused, show_progress
from llara.records import Document, Hit, Query

ONE, MANY = 10, 1000  # hits per query by default: for one query, for a run
QUERY_ID = "query"  # of a query given as text
_WORD = re.compile(r"\w+")


class Found(NamedTuple):
    """One hit of a single query, to be shown: `text` is the part of the document that speaks of the query."""

    rank: int
    score: float
    id: str
    title: str
    text: str


@dataclass
class _Totals:
    """Counts what passes by, so that the hits of all queries are never held at once."""

    hits: int = 0
    without_hits: int = 0

    def count(self, found: Iterable[Ranked]) -> Iterator[tuple[str, list[Hit]]]:
        for each in found:
            self.hits += len(each.hits)
            self.without_hits += not each.hits
            yield each.query_id, each.hits


@dataclass(frozen=True)
class SearchResult:
    """What `search` found; `answers` is filled for a single query, `output` is the run where one was written.

    `hybrid` are the indexes that were searched beside `index`.
    """

    index: Path
    hybrid: tuple[Path, ...]
    queries: int
    hits: int
    without_hits: int
    output: Path | None
    answers: tuple[Found, ...] = ()


def search(config: SearchConfig) -> SearchResult:
    """Searches one index, or several whose hits are fused, with a file of queries or with one query.

    A run holds, per query, hits by score descending, ties by document id descending; scores of one index are float32.

    Raises:
        ConfigError: An empty query, an output that is also an input or lies in the index, or a model that is neither
            given nor found where the index says it is.
        DataError: A file of queries that does not fit its format.
        ModelError: Another model than the one that made the index, or indexes that different models made.
        StorageError: A folder that is no index, is damaged, or is not there; or indexes over different documents.
    """
    if config.output is not None:
        check_file_output(config.output, [config.queries] if config.queries else [], [config.index, *config.hybrid])
    queries = _read_queries(config)
    effort = Effort(config.ef_search, config.nprobe, config.refine)
    indexes = Indexes([config.index, *config.hybrid], config, config.expansion, effort)
    top_k = config.top_k or (MANY if config.query is None else ONE)
    found: Iterable[Ranked] = _search(indexes, queries, top_k, config)
    answers: tuple[Found, ...] = ()
    totals = _Totals()
    if config.query is not None:
        (only,) = found = list(found)
        answers = _describe(only, config.query, indexes)
    pairs = totals.count(found)
    if config.output is not None:
        write_run(config.output, pairs)
        save_settings(config.output, config)
    collections.deque(pairs, maxlen=0)  # counts them where nothing was written
    return SearchResult(
        index=config.index,
        hybrid=config.hybrid,
        queries=len(queries),
        hits=totals.hits,
        without_hits=totals.without_hits,
        output=config.output,
        answers=answers,
    )


def _read_queries(config: SearchConfig) -> list[Query]:
    if config.query is not None:
        if not config.query.strip():
            raise ConfigError("--query: is empty")
        return [Query(QUERY_ID, config.query)]
    assert config.queries is not None, "the configuration checks itself"
    queries = read_queries(config.queries, config.split)
    if not queries:
        raise DataError(config.queries, None, "holds no queries")
    return queries


def _search(indexes: Indexes, queries: Sequence[Query], top_k: int, config: SearchConfig) -> Iterator[Ranked]:
    """Encodes the queries where an index needs it, at once: before a run is opened. Searches as it is iterated."""
    with contextlib.ExitStack() as stack:
        advance = show_progress(stack, "encode", len(queries)) if indexes.needs_model else None
        asked = indexes.encode([query.text for query in queries], token_budget=config.token_budget, on_batch=advance)
    depth = config.depth if config.hybrid else top_k
    fuse_hits = fusion(config.method, config.weights, config.k, top_k)
    return (fused(rankings, fuse_hits) for rankings in indexes.rank(queries, asked, depth))


def _describe(found: Ranked, query: str, indexes: Indexes) -> tuple[Found, ...]:
    documents = [Document(hit.document_id, "") for hit in found.hits]
    try:
        store = DocumentStore.open(indexes.folders[0] / indexes.opened[0].manifest.documents)
        documents = [_look_up(store, *each) for each in zip(documents, found.positions, strict=True)]
    except StorageError as error:  # the index is whole without its texts, so the hits are still right
        progress.note(f"texts cannot be shown: {error}")
    return tuple(
        Found(hit.rank, hit.score, hit.document_id, document.title, snippet(document.text, query))
        for hit, document in zip(found.hits, documents, strict=True)
    )


def _look_up(store: DocumentStore, document: Document, position: int) -> Document:
    """Returns the stored document, or the one given where the store lacks it."""
    # A store that was made anew since may have another order; only then is it searched, every shard of it.
    if position < len(store) and store.id(position) == document.id:
        return store.get(position)
    elsewhere = store.find(document.id)
    return document if elsewhere is None else store.get(elsewhere)


def snippet(text: str, query: str, width: int = 200) -> str:
    """Returns about `width` characters of a text, in one line: the part that shares most words with a query.

    Words count as the same when their first four letters are; the rarer one is in the text, the more it counts.
    """
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    wanted = {_stem(word) for word in _WORD.findall(query) if len(word) > 2}
    places = [(match.start(), stem) for match in _WORD.finditer(text) if (stem := _stem(match[0])) in wanted]
    start = _window_start(text, places, width)
    stop = len(text) if start + width >= len(text) else text.rfind(" ", start, start + width + 1)
    stop = stop if stop > start else start + width
    return f"{'… ' if start else ''}{text[start:stop]}{' …' if stop < len(text) else ''}"


def _stem(word: str) -> str:
    return word.lower()[:4]


def _window_start(text: str, places: Sequence[tuple[int, str]], width: int) -> int:
    """Returns where to cut: at the word that opens the best window, or at its sentence where that is near."""
    frequency = Counter(stem for _, stem in places)
    best, best_value, last = 0, 0.0, 0
    inside: Counter[str] = Counter()
    for first, (start, stem) in enumerate(places):
        while last < len(places) and places[last][0] < start + width * 3 // 4:
            inside[places[last][1]] += 1
            last += 1
        value = sum(1 / frequency[each] for each, count in inside.items() if count)
        if value > best_value + 1e-9:
            best, best_value = first, value
        inside[stem] -= 1
    if not places or places[best][0] < width // 4:
        return 0
    start = places[best][0]
    sentence = text.rfind(". ", start - width // 4, start)
    if sentence >= 0:
        return sentence + 2
    return text.rfind(" ", 0, max(1, start - width // 10)) + 1
