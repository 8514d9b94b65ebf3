"""Judged queries: what a job works from that needs to know which documents are relevant to which query."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llara.data.collections import BeirCollection, open_collection
from llara.data.queries import read_query_file
from llara.data.splits import normalise
from llara.data.trec import read_qrel_lines
from llara.errors import ConfigError, DataError
from llara.records import Qrel, Query


@dataclass(frozen=True)
class Judged:
    """Queries with what is relevant to them.

    Attributes:
        queries: Those that have a relevant document, in the order of their file.
        relevant: The ids of each one's relevant documents, in the order of the judgements.
        elsewhere: Of a query that stands under other ids, too, the documents that are relevant to it under any of them.
        without: How many queries were left out because nothing is relevant to them.
        path: Where the judgements stand.
    """

    queries: tuple[Query, ...]
    relevant: dict[str, tuple[str, ...]]
    elsewhere: dict[str, tuple[str, ...]]
    without: int
    path: Path
    _lines: Callable[[], Iterable[tuple[int | None, Qrel]]]

    def unknown(self, document_ids: Iterable[str]) -> DataError:
        """Returns the error that names the first judgement of documents that the corpus lacks."""
        wanted = set(document_ids)
        for line, qrel in self._lines():
            if qrel.relevance > 0 and qrel.document_id in wanted and qrel.query_id in self.relevant:
                return DataError(self.path, line, f"the corpus has no document with the id {qrel.document_id!r}")
        return DataError(self.path, None, f"the corpus lacks judged documents: {', '.join(sorted(wanted)[:3])}")


def read_judged(queries: Path, qrels: Path | None, split: str) -> Judged:
    """Returns the queries that have a relevant document.

    Args:
        queries: A plain file of queries, or a collection, of which those are taken that `split` judges.
        qrels: Judgements, as a plain file or a collection; None takes those of the collection `queries`.
        split: Split of what is a collection. Judgements of queries that are not among `queries` are passed over.

    Raises:
        ConfigError: Judgements were neither given nor part of `queries`.
        DataError: A bad row, or no query has a relevant document.
    """
    collection = open_collection(queries)
    if collection is None and qrels is None:
        raise ConfigError(f"--qrels: is required, {queries} holds queries alone")
    found = read_query_file(queries) if collection is None else collection.queries(split if qrels is None else None)
    path, lines = _judgements(qrels or queries, split)
    known = {query.id for query in found}
    relevant: dict[str, dict[str, None]] = {}
    for _, qrel in lines():
        if qrel.relevance > 0 and qrel.query_id in known:
            relevant.setdefault(qrel.query_id, {})[qrel.document_id] = None
    if not relevant:
        raise DataError(path, None, "no query has a relevant document")
    kept = tuple(query for query in found if query.id in relevant)
    ids = {query_id: tuple(documents) for query_id, documents in relevant.items()}
    return Judged(kept, ids, _elsewhere(kept, ids), len(found) - len(kept), path, lines)


def _elsewhere(queries: Sequence[Query], relevant: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    alike: dict[str, list[str]] = {}
    for query in queries:
        alike.setdefault(normalise(query.text), []).append(query.id)
    found: dict[str, tuple[str, ...]] = {}
    for ids in alike.values():
        if len(ids) > 1:
            found |= dict.fromkeys(ids, tuple({document for query_id in ids for document in relevant[query_id]}))
    return found


def _judgements(path: Path, split: str) -> tuple[Path, Callable[[], Iterable[tuple[int | None, Qrel]]]]:
    """Returns the file of judgements, and what reads them with their lines, where they stand in lines."""
    collection = open_collection(path)
    if collection is None:
        return path, lambda: ((item.line, item.qrel) for item in read_qrel_lines(path))
    if isinstance(collection, BeirCollection):
        collection.qrels(split)  # finds judgements of unknown queries
        return collection.qrels_path(split), lambda: ((item.line, item.qrel) for item in collection.qrel_lines(split))
    return path, lambda: ((None, qrel) for qrel in collection.qrels(split))
