"""The job `search`: queries become a run, or one query its hits with their texts; one index is asked, or several."""

import collections
import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llara import progress
from llara.conditions import Condition, parse_conditions
from llara.config import SearchConfig
from llara.data import read_queries, write_run
from llara.encoding.documents import DocumentStore
from llara.errors import ConfigError, DataError, StorageError
from llara.fuse import fusion
from llara.index.base import Allowed
from llara.index.faiss import Effort
from llara.index.passages import Span
from llara.index.remembered import allowed_documents
from llara.outputs import check_file_output, save_settings
from llara.ranking import Each, Indexes, Ranked, rank, show_progress
from llara.records import Document, Hit, Query

ONE, MANY = 10, 1000  # hits per query by default: for one query, for a run
QUERY_ID = "query"  # of a query given as text
FILTERS = 32  # whose documents are remembered, one bit each
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

    `hybrid` are the indexes that were searched beside `index`; `matching` counts the documents that fit `filter`, and
    were not deleted.
    """

    index: Path
    hybrid: tuple[Path, ...]
    filter: tuple[str, ...]
    matching: int | None
    queries: int
    hits: int
    without_hits: int
    output: Path | None
    answers: tuple[Found, ...] = ()


def search(config: SearchConfig) -> SearchResult:
    """Searches one index, or several whose hits are fused, with a file of queries or with one query.

    A run holds, per query, hits by score descending, ties by document id descending; scores of one index are float32.

    Raises:
        ConfigError: An empty query, an output that is also an input or lies in the index, a filter on a field that no
            document has, or a model that is neither given nor found where the index says it is.
        DataError: A file of queries that does not fit its format.
        ModelError: Another model than the one that made the index, or indexes that different models made.
        StorageError: A folder that is no index, is damaged, or is not there; or indexes over different documents.
    """
    if config.output is not None:
        check_file_output(config.output, [config.queries] if config.queries else [], [config.index, *config.hybrid])
    queries = _read_queries(config)
    searcher = Searcher(config)
    conditions = parse_conditions(config.filter)
    allowed = searcher.allowed(conditions)
    answers: tuple[Found, ...] = ()
    totals = _Totals()
    if config.query is not None:
        ranked, answers = searcher.ask(config.query, config.top_k or ONE, conditions)
        found: Iterable[Ranked] = [ranked]
    else:
        found = searcher.rank(queries, config.top_k or MANY, conditions)
    pairs = totals.count(found)
    if config.output is not None:
        write_run(config.output, pairs)
        save_settings(config.output, config)
    collections.deque(pairs, maxlen=0)  # counts them where nothing was written
    return SearchResult(
        index=config.index,
        hybrid=config.hybrid,
        filter=config.filter,
        matching=None if allowed is None else allowed.count,
        queries=len(queries),
        hits=totals.hits,
        without_hits=totals.without_hits,
        output=config.output,
        answers=answers,
    )


class Answer(NamedTuple):
    """What one query found: its hits, and the same as they are shown."""

    ranked: Ranked
    found: tuple[Found, ...]


def check_query(text: str) -> str:
    """Returns a query that a model can read; ConfigError for an empty one, or one that is not UTF-8."""
    if not text.strip():
        raise ConfigError("--query: is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python decodes a stray byte of a command line to half a surrogate pair
        raise ConfigError(f"--query: is not UTF-8: {error.reason} at character {error.start + 1}") from None
    return text


def _read_queries(config: SearchConfig) -> list[Query]:
    if config.query is not None:
        return [Query(QUERY_ID, check_query(config.query))]
    if config.queries is None:
        raise ConfigError("--interactive: is for the command line; from Python, ask a llara.search.Searcher")
    queries = read_queries(config.queries, config.split)
    if not queries:
        raise DataError(config.queries, None, "holds no queries")
    return queries


class Searcher:
    """Open indexes with their model, their texts and their filters: all that the next query needs again.

    Raises:
        ConfigError, ModelError, StorageError: As `llara.ranking.Indexes` does.
    """

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        effort = Effort(config.ef_search, config.nprobe, config.refine)
        self.indexes = Indexes([config.index, *config.hybrid], config, config.expansion, effort)
        self._allowed: dict[tuple[Condition, ...], Allowed] = {}

    @cached_property
    def store(self) -> DocumentStore:
        """The documents that the first index was built from; StorageError where they are gone."""
        return DocumentStore.open(self.indexes.folders[0] / self.indexes.opened[0].manifest.documents)

    def ask(self, text: str, top_k: int = ONE, conditions: tuple[Condition, ...] = ()) -> Answer:
        """Returns the hits of one query, with what is shown of them.

        Raises:
            ConfigError: The query is empty, or no document has a field of the conditions.
        """
        queries, allowed = [Query(QUERY_ID, check_query(text))], self.allowed(conditions)
        asked = self._encode(queries)
        (ranked,) = self._rank(queries, asked, top_k, allowed)
        spans = self.indexes.best_passages(asked, ranked.positions)
        return Answer(ranked, self._describe(ranked, text, spans))

    def rank(self, queries: Sequence[Query], top_k: int, conditions: tuple[Condition, ...] = ()) -> Iterator[Ranked]:
        """Encodes queries where an index needs it, at once: before a run is opened. Searches as it is iterated."""
        allowed = self.allowed(conditions)
        return self._rank(queries, self._encode(queries), top_k, allowed)

    def _encode(self, queries: Sequence[Query]) -> list[Any]:
        with contextlib.ExitStack() as stack:
            advance = show_progress(stack, "encode", len(queries)) if self.indexes.needs_model else None
            texts = [query.text for query in queries]
            return self.indexes.encode(texts, token_budget=self.config.token_budget, on_batch=advance)

    def _rank(
        self, queries: Sequence[Query], asked: list[Any], top_k: int, allowed: Allowed | None
    ) -> Iterator[Ranked]:
        config = self.config
        index = self.indexes.together(fusion(config.method, config.weights, config.k), config.depth)
        return rank(index, queries, Each(asked) if len(asked) > 1 else asked[0], top_k, allowed)

    def allowed(self, conditions: tuple[Condition, ...]) -> Allowed | None:
        """Returns which documents fit all conditions, None where there is no condition; tells each filter once.

        Raises:
            ConfigError: No document has a field of a condition, or a value of its type there.
            StorageError: The documents are gone, damaged, or not those of the index.
        """
        if not conditions:
            return None
        if conditions not in self._allowed:
            folder, index = self.indexes.folders[0], self.indexes.opened[0]
            found = allowed_documents(conditions, folder, index.manifest, self.store, index.ids)
            if len(self._allowed) == FILTERS:
                del self._allowed[next(iter(self._allowed))]
            self._allowed[conditions] = found
        return self._allowed[conditions]

    def _describe(self, found: Ranked, query: str, spans: Sequence[Span | None]) -> tuple[Found, ...]:
        """Returns the hits with titles and the parts of the texts that speak of the query; a note where texts lack.

        Where a document's best passage is known, the part is one of that.
        """
        documents = [Document(hit.document_id, "") for hit in found.hits]
        try:
            documents = [self._look_up(*each) for each in zip(documents, found.positions, strict=True)]
        except StorageError as error:  # the index is whole without its texts, so the hits are still right
            progress.note(f"texts cannot be shown: {error}")
        return tuple(
            Found(hit.rank, hit.score, hit.document_id, document.title, _snippet(document.text, span, query))
            for hit, document, span in zip(found.hits, documents, spans, strict=True)
        )

    def _look_up(self, document: Document, position: int) -> Document:
        """Returns the stored document, or the one given where the store lacks it."""
        # A store that was made anew since may have another order; only then is it searched, every shard of it.
        if position < len(self.store) and self.store.id(position) == document.id:
            return self.store.get(position)
        elsewhere = self.store.find(document.id)
        return document if elsewhere is None else self.store.get(elsewhere)


def _snippet(text: str, span: Span | None, query: str) -> str:
    return snippet(text if span is None else text[span[0] : span[1]], query)


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
