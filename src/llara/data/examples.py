"""Training examples in memory, for scripts and small sets; `store.py` keeps those of a training run on disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llara.data.collections import BeirCollection, Collection, check_split, open_collection
from llara.data.layouts import TrainingRow, read_training_rows
from llara.errors import DataError
from llara.records import Example, Passage


def read_examples(paths: Sequence[Path], split: str = "train") -> list[Example]:
    """Returns the training examples of all files and collections, in order; `split` is that of the collections.

    DataError with file and line for a row that does not fit or names passages by id, and for a judged document that the
    corpus lacks.
    """
    examples: list[Example] = []
    for path in map(Path, paths):
        collection = open_collection(path)
        found = list(_from_file(path)) if collection is None else collection_examples(collection, split)
        if not found:
            raise DataError(path, None, "no training example: no query has a relevant document")
        examples.extend(found)
    return examples


def collection_examples(collection: Collection, split: str) -> list[Example]:
    """Returns one example per query of the split that has a relevant document, with all of them and no negatives.

    Relevant documents with the same title and text count once.
    """
    relevant = judged_documents(collection, split)
    wanted = {document_id for document_ids in relevant.values() for document_id in document_ids}
    passages = {
        document.id: Passage(document.text, document.title)
        for document in collection.documents()
        if document.id in wanted
    }
    if len(passages) < len(wanted):
        raise unknown_document(collection, split, wanted - passages.keys())
    return [
        Example(query.text, tuple(dict.fromkeys(passages[document_id] for document_id in relevant[query.id])))
        for query in collection.queries(split)
        if query.id in relevant
    ]


def judged_documents(collection: Collection, split: str) -> dict[str, list[str]]:
    """Returns the ids of each query's relevant documents, in the order of the judgements."""
    check_split(collection, split)
    relevant: dict[str, list[str]] = {}
    for qrel in collection.qrels(split):
        if qrel.relevance > 0:
            relevant.setdefault(qrel.query_id, []).append(qrel.document_id)
    return relevant


def unknown_document(collection: Collection, split: str, unknown: set[str]) -> DataError:
    """Returns the error that names the first judgement of an unknown document."""
    if isinstance(collection, BeirCollection):
        for line, qrel in collection.qrel_lines(split):
            if qrel.relevance > 0 and qrel.document_id in unknown:
                reason = f"the corpus has no document with the id {qrel.document_id!r}"
                return DataError(collection.qrels_path(split), line, reason)
    return DataError(collection.path, None, f"the corpus lacks judged documents: {', '.join(sorted(unknown)[:3])}")


def _from_file(path: Path) -> Iterator[Example]:
    for row in read_training_rows(path):
        if not isinstance(row.query, str):
            raise DataError(row.path, row.line, "names its query by id, not by text")
        positives, negatives = _texts(row, row.positives), _texts(row, row.negatives)
        yield Example(row.query, positives, negatives, row.positive_scores, row.negative_scores)


def _texts(row: TrainingRow, passages: Sequence[object]) -> tuple[Passage, ...]:
    texts = tuple(passage for passage in passages if isinstance(passage, Passage))
    if len(texts) < len(passages):
        raise DataError(row.path, row.line, "names its passages by id, not by text")
    return texts
