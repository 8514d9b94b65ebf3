"""Queries and the indexes of one corpus: texts are encoded once for all of them, and each index gives its hits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from llara import progress
from llara.config import ModelConfig
from llara.encoding.manifest import SPARSE, is_local
from llara.errors import ConfigError, ModelError, StorageError
from llara.fuse import Fusion
from llara.index.base import Allowed, Asks, Floats, Positions, TopK, best_first, stack
from llara.index.faiss import Effort
from llara.index.opening import AnyIndex, open_index
from llara.index.parts import same_documents
from llara.index.passages import Span, best_passages, part
from llara.records import Hit, Query
from llara.templates import Template

if TYPE_CHECKING:
    from llara.lexical import TermOptions
    from llara.retriever import Retriever

Expansion = Literal["auto", "yes", "no"]
BLOCK = 256  # queries searched between two steps of the progress


class Ranked(NamedTuple):
    """The hits of one query, best first, and where their documents stand in the index."""

    query_id: str
    hits: list[Hit]
    positions: list[int]


class Indexes:
    """One or more open indexes over the same documents, and the model that those of vectors need.

    Attributes:
        folders: Where each lies.
        opened: The indexes, in the same order.

    Raises:
        ConfigError: A model is needed, and neither given nor found where an index says it is; or an effort that no
            index knows.
        ModelError: The model is another one than made an index, or two indexes were made by different ones.
        StorageError: A folder is no index, is damaged, or is not there; or two hold different documents.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        config: ModelConfig,
        expansion: Expansion = "auto",
        effort: Effort | None = None,
    ) -> None:
        self.folders = tuple(folders)
        self.opened: list[AnyIndex] = _open_all(folders, config, effort)
        pairs = list(zip(self.folders, self.opened, strict=True))
        by_model = [(folder, index) for folder, index in pairs if index.asks != "texts"]
        _check_documents(pairs)
        _check_models(by_model)
        self._sparse = _sparse_settings(by_model)
        self._expansion = expansion
        self._retriever = open_retriever(by_model, config) if by_model else None

    def __len__(self) -> int:
        return len(self.opened)

    def encode(self, texts: Sequence[str], **options: Any) -> list[Any]:
        """Returns what each index is searched with for these texts; `options` are those of `Retriever.encode_queries`.

        A vector and its terms come from one forward pass.
        """
        vectors: Any = None
        terms: Any = None
        if self._retriever is not None and self._sparse is not None:
            vectors, terms = self._retriever.encode_queries_with_terms(texts, self._term_options(), **options)
        elif self._retriever is not None:
            vectors = self._retriever.encode_queries(texts, **options)
        asked = {"vectors": vectors, "terms": terms, "texts": list(texts)}
        return [asked[index.asks] for index in self.opened]

    @property
    def needs_model(self) -> bool:
        """Whether texts are encoded by a model."""
        return self._retriever is not None

    def together(self, fuse_hits: Fusion, depth: int) -> AnyIndex:
        """Returns the index, or one that searches all of them and fuses their first `depth` hits."""
        return self.opened[0] if len(self.opened) == 1 else FusedIndex(self.opened, fuse_hits, depth)

    def best_passages(self, asked: Sequence[Any], positions: Sequence[int]) -> list[Span | None]:
        """Returns where the best passage for one query stands in the text of each document.

        Told by the first index that has several passages of a document; None for each where none has. `asked` is what
        `encode` gave for the query.
        """
        for index, each in zip(self.opened, asked, strict=True):
            found = best_passages(index, each, np.array(positions, np.int64))
            if found is not None:
                return list(found)
        return [None] * len(positions)

    def _term_options(self) -> "TermOptions":
        from llara.lexical import TermOptions

        assert self._sparse is not None
        settings = {name: value for name, value in self._sparse.items() if name != "vocabulary"}
        if self._expansion != "auto":
            settings["expansion"] = self._expansion == "yes"
        return TermOptions(**settings)


@dataclass(frozen=True)
class Each:
    """Queries for several indexes: for each index what it is searched with, as `Indexes.encode` returns it."""

    asked: Sequence[Any]

    @property
    def count(self) -> int:
        """Returns the number of queries."""
        return len(self.asked[0])

    def part(self, start: int, stop: int) -> "Each":
        """Returns the queries `start` to `stop` (exclusive)."""
        return Each([_part(each, start, stop) for each in self.asked])


class FusedIndex:
    """Several indexes over the same documents as one: their first hits are fused, query by query."""

    asks: Asks = "each"

    def __init__(self, indexes: Sequence[AnyIndex], fuse_hits: Fusion, depth: int) -> None:
        self.indexes, self.depth, self._fuse_hits = tuple(indexes), depth, fuse_hits
        self.manifest, self.ids = indexes[0].manifest, indexes[0].ids
        self.model = next((index.model for index in indexes if index.model), "")

    def __len__(self) -> int:
        return len(self.indexes[0])

    def search(self, queries: Each, top_k: int, allowed: Allowed | None = None) -> TopK:
        """See `Index.search`; a hit is a document among the first ones of any index, and its score the fused one."""
        top_k = min(top_k, len(self) if allowed is None else allowed.count)
        return stack([_first(self._fused(row), top_k) for row in self._searched(queries, allowed)], top_k)

    def score(self, queries: Each, positions: Sequence[Positions]) -> list[Floats]:
        """See `Index.score`; 0 for a document that is not among the first ones of any index."""
        scores = []
        for row, asked in zip(self._searched(queries, None), positions, strict=True):
            known = dict(zip(*(each.tolist() for each in reversed(self._fused(row))), strict=True))
            scores.append(np.array([known.get(position, 0.0) for position in asked.tolist()], np.float32))
        return scores

    def _searched(self, queries: Each, allowed: Allowed | None) -> Iterator[tuple[list[Hit], ...]]:
        """Yields for each query its hits in each index, with positions for ids."""
        found = [
            index.search(asked, self.depth, allowed) for index, asked in zip(self.indexes, queries.asked, strict=True)
        ]
        for row in range(queries.count):
            yield tuple(_hits(top.scores[row], top.positions[row]) for top in found)

    def _fused(self, rankings: Sequence[list[Hit]]) -> tuple[Floats, Positions]:
        """Returns scores and positions of all fused hits, best first."""
        hits = self._fuse_hits("", rankings)
        scores = np.array([hit.score for hit in hits], np.float32)
        positions = np.array([int(hit.document_id) for hit in hits], np.int64)
        return best_first(scores, positions, self.ids, len(hits))


def _part(asked: Any, start: int, stop: int) -> Any:
    return asked.part(start, stop) if isinstance(asked, Each) else part(asked, start, stop)


def _hits(scores: Floats, positions: Positions) -> list[Hit]:
    found = int((positions >= 0).sum())  # a row is filled up at its end
    pairs = zip(positions[:found].tolist(), scores[:found].tolist(), strict=True)
    return [Hit("", str(position), rank, score) for rank, (position, score) in enumerate(pairs, 1)]


def _first(row: tuple[Floats, Positions], top_k: int) -> tuple[Floats, Positions]:
    return row[0][:top_k], row[1][:top_k]


def rank(
    index: AnyIndex, queries: Sequence[Query], asked: Any, top_k: int, allowed: Allowed | None = None
) -> Iterator[Ranked]:
    """Yields for each query its `top_k` best hits; `asked` is what the index is searched with for their texts.

    Searches as it is iterated, so that the hits of all queries are never held at once. With `allowed`, hits are
    documents in it.
    """
    with contextlib.ExitStack() as stack:
        advance = show_progress(stack, "search", len(queries))
        for start in range(0, len(queries), BLOCK):
            block = queries[start : start + BLOCK]
            found = index.search(_part(asked, start, start + len(block)), top_k, allowed)
            rows = zip(block, found.scores.tolist(), found.positions.tolist(), strict=True)
            yield from (_ranked(query.id, scores, positions, index) for query, scores, positions in rows)
            advance(len(block))


def _ranked(query_id: str, scores: list[float], positions: list[int], index: AnyIndex) -> Ranked:
    positions = [position for position in positions if position >= 0]
    pairs = enumerate(zip(scores, positions, strict=False), 1)  # a row is filled up at its end
    hits = [Hit(query_id, index.ids[position], rank, score) for rank, (score, position) in pairs]
    return Ranked(query_id, hits, positions)


def show_progress(stack: contextlib.ExitStack, label: str, total: int) -> Callable[[int], None]:
    """Opens a progress for several queries; for a single one there is nothing to show."""
    if total == 1:
        return lambda _: None
    shown = stack.enter_context(progress.Progress(label, total, "queries"))
    return lambda done: shown.advance(done)


def _open_all(folders: Sequence[Path], config: ModelConfig, effort: Effort | None) -> list[AnyIndex]:
    """Opens indexes. An effort goes to those that are approximate; one that none of them knows is a ConfigError."""
    opened = [open_index(folder, verify=config.verify, effort=effort) for folder in folders]
    problems = effort.unread_by(index.manifest.type for index in opened) if effort else []
    if problems:
        raise ConfigError(problems)
    return opened


# Which model, and whether it fits ------------------------------------------------------------------------------------


def open_retriever(indexes: Sequence[tuple[Path, AnyIndex]], config: ModelConfig) -> "Retriever":
    """Opens the model that made the vectors of indexes: the one given, else the one that the first of them names.

    Raises:
        ConfigError: No model was given, and the index names none that is on this machine.
        ModelError: The model cannot be opened, or is another one than made an index.
    """
    folder, index = indexes[0]
    model = config.model or index.model
    if not model:
        raise ConfigError("--model: is required, the index does not say which model it was built with")
    # An index may come from anybody: what it names is opened where it is here already, and never fetched.
    if not config.model and not is_local(model):
        where = f"{folder} was built with {model}, which is no folder on this machine"
        raise ConfigError(f"--model: is required, {where}; name the folder or hub id of that model")
    from llara.retriever import Retriever  # imports torch, which a search in words does not need

    try:
        retriever = Retriever.for_job(replace(config, model=model), _template_of(*indexes[0]))
    except ModelError as error:
        if config.model:
            raise
        raise ModelError(f"{error}; this is the model that the index names, if it has moved give --model") from error
    for _, each in indexes:
        check_model(each, model, retriever.identity)
    return retriever


def _template_of(folder: Path, index: AnyIndex) -> Template | None:
    """Returns the template that the index's vectors were made with, so that a base model need not be told it again."""
    contract = (index.manifest.model or {}).get("contract")
    values = contract.get("template") if isinstance(contract, Mapping) else None
    return Template.from_dict(values, str(folder)) if isinstance(values, Mapping) else None


def check_model(index: AnyIndex, model: str, identity: dict[str, Any]) -> None:
    """Raises ModelError, with every difference, when a model is not the one that made the index.

    The type of the weights may differ: a corpus encoded in bfloat16 on a GPU may be searched in float32 on a CPU.
    """
    differing = _differences(index.manifest.model or {}, identity)
    if differing:
        raise ModelError(
            f"{model}: is not the model that the index was built with, {index.model} ({differing}); "
            "search with that one, or encode the corpus again with this one"
        )


def _check_models(indexes: Sequence[tuple[Path, AnyIndex]]) -> None:
    """Raises ModelError where indexes were made by different models: before one of them is loaded."""
    for folder, index in indexes[1:]:
        differing = _differences(indexes[0][1].manifest.model or {}, dict(index.manifest.model or {}))
        if differing:
            both = f"{index.model} and {indexes[0][1].model}"
            raise ModelError(
                f"{folder}: was built with another model than {indexes[0][0]}: {both} ({differing}); "
                "one model answers for all indexes of a search: fuse the runs of two with llara fuse"
            )


def _check_documents(indexes: Sequence[tuple[Path, AnyIndex]]) -> None:
    """Raises StorageError where indexes hold different documents, which their ids tell."""
    first_folder, first = indexes[0]
    for folder, index in indexes[1:]:
        if what := same_documents((first_folder, first), (folder, index)):
            advice = "build all indexes of a search from the same corpus, and delete from all of them"
            raise StorageError(folder, f"holds other documents than {first_folder} ({what}); {advice}")


def _sparse_settings(indexes: Sequence[tuple[Path, AnyIndex]]) -> dict[str, Any] | None:
    """Returns how the terms of the sparse indexes were chosen; None where there is no such index."""
    found = [(folder, (index.manifest.model or {})[SPARSE]) for folder, index in indexes if index.asks == "terms"]
    for folder, settings in found[1:]:
        if settings != found[0][1]:
            what = f"its terms were chosen otherwise than those of {found[0][0]} ({settings} and {found[0][1]})"
            raise StorageError(folder, f"{what}; search one of the two")
    return found[0][1] if found else None


def _differences(old: Any, new: dict[str, Any]) -> str:
    """Says in what the models of two identities differ; empty where they are the same."""
    names = ("model_fingerprint", "dim", "contract")
    first, second = (_flatten({name: each.get(name) for name in names}) for each in (old, new))
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return ", ".join(f"{name} was {_short(first.get(name))}, is {_short(second.get(name))}" for name in differing[:4])


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item}
    return flat


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)
