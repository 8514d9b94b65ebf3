"""The job `search`: queries become a run, or one query its hits with their texts."""

import collections
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llara import progress
from llara.config import ModelConfig, SearchConfig
from llara.data import read_queries, write_run
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import is_local
from llara.errors import ConfigError, DataError, ModelError, StorageError
from llara.index.base import Floats
from llara.index.bm25 import Bm25Index
from llara.index.build import open_index
from llara.index.flat import FlatIndex
from llara.outputs import check_file_output, save_settings
from llara.records import Document, Hit, Query
from llara.templates import Template

if TYPE_CHECKING:
    from llara.retriever import Retriever

ONE, MANY = 10, 1000  # hits per query by default: for one query, for a run
QUERY_ID = "query"  # of a query given as text
_BLOCK = 256  # queries searched between two steps of the progress
_WORD = re.compile(r"\w+")


class Found(NamedTuple):
    """One hit of a single query, to be shown: `text` is the part of the document that speaks of the query."""

    rank: int
    score: float
    id: str
    title: str
    text: str


class _Ranked(NamedTuple):
    """The hits of one query, best first, and where their documents stand in the index."""

    query_id: str
    hits: list[Hit]
    positions: list[int]


@dataclass
class _Totals:
    """Counts what passes by, so that the hits of all queries are never held at once."""

    hits: int = 0
    without_hits: int = 0

    def count(self, found: Iterable[_Ranked]) -> Iterator[tuple[str, list[Hit]]]:
        for each in found:
            self.hits += len(each.hits)
            self.without_hits += not each.hits
            yield each.query_id, each.hits


@dataclass(frozen=True)
class SearchResult:
    """What `search` found; `answers` is filled for a single query, `output` is the run where one was written."""

    index: Path
    queries: int
    hits: int
    without_hits: int
    output: Path | None
    answers: tuple[Found, ...] = ()


def search(config: SearchConfig) -> SearchResult:
    """Searches an index with a file of queries or with one query.

    A run holds, per query, hits by score descending, ties by document id descending; scores are float32.

    Raises:
        ConfigError: An empty query, an output that is also an input or lies in the index, or a model that is neither
            given nor found where the index says it is.
        DataError: A file of queries that does not fit its format.
        ModelError: Another model than the one that made the index.
        StorageError: A folder that is no index, is damaged, or is not there.
    """
    if config.output is not None:
        check_file_output(config.output, [config.queries] if config.queries else [], [config.index])
    queries = _read_queries(config)
    index = open_index(config.index, verify=config.verify)
    top_k = config.top_k or (MANY if config.query is None else ONE)
    found: Iterable[_Ranked] = _search(index, queries, top_k, config)
    answers: tuple[Found, ...] = ()
    totals = _Totals()
    if config.query is not None:
        (only,) = found = list(found)
        answers = _describe(only, config.query, config.index, index)
    pairs = totals.count(found)
    if config.output is not None:
        write_run(config.output, pairs)
        save_settings(config.output, config)
    collections.deque(pairs, maxlen=0)  # counts them where nothing was written
    return SearchResult(
        index=config.index,
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


def _search(
    index: FlatIndex | Bm25Index, queries: Sequence[Query], top_k: int, config: SearchConfig
) -> Iterator[_Ranked]:
    """Encodes the queries where the index needs it, at once: before a run is opened. Searches as it is iterated."""
    texts = [query.text for query in queries]
    return _rank(index, queries, _encode(index, texts, config) if isinstance(index, FlatIndex) else None, top_k)


def _rank(
    index: FlatIndex | Bm25Index, queries: Sequence[Query], vectors: Floats | None, top_k: int
) -> Iterator[_Ranked]:
    with contextlib.ExitStack() as stack:
        advance = _advance(stack, "search", len(queries))
        for start in range(0, len(queries), _BLOCK):
            block = queries[start : start + _BLOCK]
            if isinstance(index, Bm25Index):
                found = index.search([query.text for query in block], top_k)
            else:
                assert vectors is not None
                found = index.search(vectors[start : start + _BLOCK], top_k)
            for query, scores, positions in zip(block, found.scores.tolist(), found.positions.tolist(), strict=True):
                yield _ranked(query.id, scores, positions, index)
            advance(len(block))


def _ranked(query_id: str, scores: list[float], positions: list[int], index: FlatIndex | Bm25Index) -> _Ranked:
    positions = [position for position in positions if position >= 0]
    pairs = enumerate(zip(scores, positions, strict=False), 1)  # a row is filled up at its end
    hits = [Hit(query_id, index.ids[position], rank, score) for rank, (score, position) in pairs]
    return _Ranked(query_id, hits, positions)


def _encode(index: FlatIndex, texts: list[str], config: SearchConfig) -> Floats:
    retriever = open_retriever(index, config.index, config)
    with contextlib.ExitStack() as stack:
        advance = _advance(stack, "encode", len(texts))
        return retriever.encode_queries(texts, token_budget=config.token_budget, on_batch=advance)


def open_retriever(index: FlatIndex, folder: Path, config: ModelConfig) -> "Retriever":
    """Opens the model that made the vectors of the index in `folder`: the one given, else the one that it names.

    Raises:
        ConfigError: No model was given, and the index names none that is on this machine.
        ModelError: The model cannot be opened, or is another one than made the index.
    """
    model = config.model or index.model
    if not model:
        raise ConfigError("--model: is required, the index does not say which model it was built with")
    # An index may come from anybody: what it names is opened where it is here already, and never fetched.
    if not config.model and not is_local(model):
        where = f"{folder} was built with {model}, which is no folder on this machine"
        raise ConfigError(f"--model: is required, {where}; name the folder or hub id of that model")
    from llara.retriever import Retriever  # imports torch, which a search in words does not need

    try:
        retriever = Retriever.for_job(replace(config, model=model), _template_of(index, folder))
    except ModelError as error:
        if config.model:
            raise
        raise ModelError(f"{error}; this is the model that the index names, if it has moved give --model") from error
    check_model(index, model, retriever.identity)
    return retriever


def _template_of(index: FlatIndex, folder: Path) -> Template | None:
    """Returns the template that the index's vectors were made with, so that a base model need not be told it again."""
    contract = (index.manifest.model or {}).get("contract")
    values = contract.get("template") if isinstance(contract, Mapping) else None
    return Template.from_dict(values, str(folder)) if isinstance(values, Mapping) else None


def _advance(stack: contextlib.ExitStack, label: str, total: int) -> Callable[[int], None]:
    """Opens a progress for several queries; for a single one there is nothing to show."""
    if total == 1:
        return lambda _: None
    shown = stack.enter_context(progress.Progress(label, total, "queries"))
    return lambda done: shown.advance(done)


def check_model(index: FlatIndex, model: str, identity: dict[str, Any]) -> None:
    """Raises ModelError, with every difference, when a model is not the one that made the index.

    The type of the weights may differ: a corpus encoded in bfloat16 on a GPU may be searched in float32 on a CPU.
    """
    names = ("model_fingerprint", "dim", "contract")
    old, new = (_flatten({name: each.get(name) for name in names}) for each in (index.manifest.model or {}, identity))
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if differing:
        listed = ", ".join(f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in differing[:4])
        raise ModelError(
            f"{model}: is not the model that the index was built with, {index.model} ({listed}); "
            "search with that one, or encode the corpus again with this one"
        )


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return flat


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)


def _describe(found: _Ranked, query: str, folder: Path, index: FlatIndex | Bm25Index) -> tuple[Found, ...]:
    documents = [Document(hit.document_id, "") for hit in found.hits]
    try:
        store = DocumentStore.open(folder / index.manifest.documents)
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
