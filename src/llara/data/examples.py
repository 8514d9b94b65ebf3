"""Training examples, from JSON lines with `query`, `pos`, `neg`, or from the judgements of a collection."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llara.data.collections import BeirCollection, Collection, check_split, open_collection
from llara.data.documents import check_text, json_type, parse_object
from llara.data.rows import Row, format_of, read_rows
from llara.errors import DataError, nearest
from llara.records import Example, Passage


def read_examples(paths: Sequence[Path], split: str = "train") -> list[Example]:
    """Returns the training examples of all files and collections, in order; `split` is that of the collections.

    DataError with file and line for a row that does not fit, and for a judged document that the corpus lacks.
    """
    examples: list[Example] = []
    for path in map(Path, paths):
        collection = open_collection(path)
        found = list(_from_lines(path)) if collection is None else collection_examples(collection, split)
        if not found:
            raise DataError(path, None, "no training example: no query has a relevant document")
        examples.extend(found)
    return examples


def collection_examples(collection: Collection, split: str) -> list[Example]:
    """Returns one example per query of the split that has a relevant document, with all of them and no negatives.

    Relevant documents with the same title and text count once.
    """
    check_split(collection, split)
    relevant: dict[str, list[str]] = {}
    for qrel in collection.qrels(split):
        if qrel.relevance > 0:
            relevant.setdefault(qrel.query_id, []).append(qrel.document_id)
    wanted = {document_id for document_ids in relevant.values() for document_id in document_ids}
    passages = {
        document.id: Passage(document.text, document.title)
        for document in collection.documents()
        if document.id in wanted
    }
    if len(passages) < len(wanted):
        raise _unknown_document(collection, split, wanted - passages.keys())
    return [
        Example(query.text, tuple(dict.fromkeys(passages[document_id] for document_id in relevant[query.id])))
        for query in collection.queries(split)
        if query.id in relevant
    ]


def _unknown_document(collection: Collection, split: str, unknown: set[str]) -> DataError:
    """Returns the error that names the first judgement of an unknown document."""
    if isinstance(collection, BeirCollection):
        for line, qrel in collection.qrel_lines(split):
            if qrel.relevance > 0 and qrel.document_id in unknown:
                reason = f"the corpus has no document with the id {qrel.document_id!r}"
                return DataError(collection.qrels_path(split), line, reason)
    return DataError(collection.path, None, f"the corpus lacks judged documents: {', '.join(sorted(unknown)[:3])}")


def _from_lines(path: Path) -> Iterator[Example]:
    if format_of(path) != "json lines":
        reason = "training data is JSON lines with query, pos, neg, or a collection (BEIR folder, pairs, SQuAD JSON)"
        raise DataError(path, None, reason)
    for row in read_rows([path]):
        yield _example(row)


def _example(row: Row) -> Example:
    fields = parse_object(row)
    for name in ("query", "pos"):
        if name not in fields:
            raise DataError(row.path, row.line, f"no field {name}{nearest(name, fields)}")
    query = check_text(row, fields["query"], "query", "query")
    positives = _passages(row, "pos", fields["pos"])
    negatives = _passages(row, "neg", fields.get("neg", []))
    if not positives:
        raise DataError(row.path, row.line, "pos is empty: an example needs at least one relevant passage")
    same = {_compared(passage) for passage in positives}
    for number, passage in enumerate(negatives):
        if _compared(passage) in same:
            raise DataError(row.path, row.line, f"neg[{number}] is also a positive: {passage.text[:60]!r}")
    return Example(query, positives, negatives)


def _passages(row: Row, field: str, value: Any) -> tuple[Passage, ...]:
    if not isinstance(value, list):
        reason = (
            f"the field {field} must be a list of texts or of objects with title and text, but is {json_type(value)}"
        )
        raise DataError(row.path, row.line, reason)
    return tuple(_passage(row, f"{field}[{number}]", item) for number, item in enumerate(value))


def _passage(row: Row, field: str, value: Any) -> Passage:
    if isinstance(value, str):
        return Passage(check_text(row, value, f"passage in {field}", field))
    if not isinstance(value, dict):
        raise DataError(row.path, row.line, f"{field} is neither text nor an object with text but {json_type(value)}")
    title = value.get("title") or ""
    if not isinstance(title, str):
        raise DataError(row.path, row.line, f"{field}.title is not text but {json_type(title)}")
    return Passage(check_text(row, value.get("text"), f"passage in {field}", f"{field}.text"), title)


def _compared(passage: Passage) -> tuple[str, str]:
    return passage.title.strip(), passage.text.strip()
