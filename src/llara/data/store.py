"""Training examples on disk: read and checked once, whatever their layout, then read at random by number.

`examples-<set>` holds one line per example: the query's text, and the numbers of its passages in `passages`, which all
sets share. So that memory grows with neither: only ids, in a table on disk, tell which passage is meant. Of a
collection, its judgements are in memory while it is read.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llara.data.collections import Collection, open_collection
from llara.data.documents import parse_document
from llara.data.examples import judged_documents, unknown_document
from llara.data.layouts import ById, TrainingRow, read_training_rows
from llara.data.lines import digest
from llara.data.queries import iter_queries
from llara.data.rows import beir_file, read_rows
from llara.data.seekable import LineReader, LineWriter, Numbers
from llara.errors import DataError, StorageError
from llara.files import FileRecord, check_file, confined, disk_errors, publish_folder, read_json, write_json_atomic
from llara.progress import Progress
from llara.records import Passage

_DONE = "sets.json"


class StoredExample(NamedTuple):
    """A training example whose passages are numbers; its scores are as in `Example`."""

    query: str
    positives: tuple[int, ...]
    negatives: tuple[int, ...]
    positive_scores: tuple[float, ...]
    negative_scores: tuple[float, ...]


class SetSource(NamedTuple):
    """Where one set comes from: a file or a collection, of which `split` is taken.

    scored: whether every example must have a teacher's scores.
    """

    path: Path
    split: str = "train"
    scored: bool = False


class TrainingData(NamedTuple):
    """Where training data comes from: its sets, and what their rows name by id."""

    sets: Sequence[SetSource]
    corpus: Sequence[Path] = ()
    queries: Path | None = None


class ExampleSet:
    """The examples of one set, by number."""

    def __init__(self, name: str, examples: LineReader, passages: LineReader) -> None:
        self.name, self._examples, self._passages = name, examples, passages

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, number: int) -> StoredExample:
        query, *lists = self._examples[number]
        return StoredExample(query, *map(tuple, lists))

    def passage(self, number: int) -> Passage:
        """Returns a passage by the number that an example gives for it."""
        title, text = self._passages[number]
        return Passage(text, title)


def prepare_examples(folder: Path, data: TrainingData) -> list[ExampleSet]:
    """Reads and checks training data into `folder`, unless an earlier run has done so, and opens its sets.

    Raises:
        DataError: A row that does not fit, an id that is missing, or a set without an example; by file and line.
        StorageError: What an earlier run prepared is damaged, or the disk is full.
    """
    if not (folder / _DONE).is_file():
        staged = folder.with_name(f".tmp-{folder.name}")
        with disk_errors(staged):
            shutil.rmtree(staged, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            staged.mkdir(parents=True)
        try:
            _convert(staged, data)
            publish_folder(staged, folder)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    else:
        _check(folder)
    passages = LineReader(folder, "passages")
    return [
        ExampleSet(str(each.path), LineReader(folder, f"examples-{number}"), passages)
        for number, each in enumerate(data.sets)
    ]


def _check(folder: Path) -> None:
    try:
        for name, entry in read_json(folder / _DONE).items():
            check_file(confined(folder, name), FileRecord(*entry), full=True)
    except StorageError as error:
        raise StorageError(error.path, f"{error.reason}; delete {folder} to read the examples again") from error


def _convert(folder: Path, data: TrainingData) -> None:
    records: dict[str, FileRecord] = {}
    with contextlib.ExitStack() as stack:
        passages = stack.enter_context(LineWriter(folder, "passages"))
        named = stack.enter_context(_Named(folder, data, passages))
        progress = stack.enter_context(Progress("read", None, "examples"))
        for number, source in enumerate(data.sets):
            with LineWriter(folder, f"examples-{number}") as examples:
                for example in _examples(source, named, passages):
                    examples.add(example)
                    progress.advance()
                if not examples.count:
                    raise DataError(source.path, None, "no training example: no query has a relevant document")
                records |= examples.close()
        records |= passages.close()
    write_json_atomic(folder / _DONE, {name: list(record) for name, record in records.items()})


def _examples(source: SetSource, named: "_Named", passages: LineWriter) -> Iterator[StoredExample]:
    collection = open_collection(source.path)
    if collection is not None:
        if source.scored:
            raise DataError(source.path, None, "a collection has no teacher's scores, which --distill needs")
        yield from _of_collection(collection, source.split, passages)
        return
    for row in read_training_rows(source.path, ids=named.both):
        if source.scored and (not row.positive_scores or len(row.negative_scores) != len(row.negatives)):
            raise DataError(row.path, row.line, "no pos_scores and neg_scores, which --distill needs")
        yield StoredExample(
            named.query(row),
            tuple(named.passage(row, each) for each in row.positives),
            tuple(named.passage(row, each) for each in row.negatives),
            row.positive_scores,
            row.negative_scores,
        )


def _of_collection(collection: Collection, split: str, passages: LineWriter) -> Iterator[StoredExample]:
    """Yields one example per query that has a relevant document; of documents with equal texts one counts."""
    relevant = judged_documents(collection, split)
    wanted = {document_id for document_ids in relevant.values() for document_id in document_ids}
    numbers: dict[str, int] = {}
    texts: dict[bytes, int] = {}
    for document in collection.documents():
        if document.id in wanted:
            key = digest(f"{document.title}\0{document.text}".encode())
            if key not in texts:
                texts[key] = passages.add([document.title, document.text])
            numbers[document.id] = texts[key]
    if len(numbers) < len(wanted):
        raise unknown_document(collection, split, wanted - numbers.keys())
    for query in collection.queries(split):
        if query.id in relevant:
            positives = tuple(dict.fromkeys(numbers[document_id] for document_id in relevant[query.id]))
            yield StoredExample(query.text, positives, (), (), ())


class _Named:
    """What rows name by id: queries and passages. A context manager; its tables go when it is left."""

    def __init__(self, folder: Path, data: TrainingData, passages: LineWriter) -> None:
        self._folder, self._data, self._passages = folder, data, passages
        self._stack = contextlib.ExitStack()
        self._tables: dict[str, Numbers] = {}

    def __enter__(self) -> "_Named":
        with contextlib.ExitStack() as stack:
            if self._data.corpus:
                self._tables["corpus"] = stack.enter_context(Numbers(self._folder / "corpus.sqlite"))
                self._read_corpus(self._tables["corpus"])
            if self._data.queries is not None:
                self._tables["queries"] = stack.enter_context(Numbers(self._folder / "queries.sqlite"))
                stack.callback(self._remove, self._read_queries(self._tables["queries"], self._data.queries))
            self._stack = stack.pop_all()
        return self

    def _read_corpus(self, table: Numbers) -> None:
        with Progress("read", None, "documents") as progress:
            for row in read_rows(self._data.corpus):
                document = parse_document(row)
                if not table.add(document.id, self._passages.add([document.title, document.text])):
                    raise DataError(row.path, row.line, f"duplicate document id {document.id!r}")
                progress.advance()

    def _read_queries(self, table: Numbers, path: Path) -> Mapping[str, FileRecord]:
        with LineWriter(self._folder, "queries") as writer:
            for row, query in iter_queries(beir_file(path, "queries.jsonl") or path):
                if not table.add(query.id, writer.add(query.text)):
                    raise DataError(row.path, row.line, f"duplicate query id {query.id!r}")
            records = writer.close()
        self._queries = LineReader(self._folder, "queries")
        return records

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _remove(self, names: Mapping[str, FileRecord]) -> None:
        del self._queries
        for name in names:
            (self._folder / name).unlink()

    @property
    def both(self) -> bool:
        """Whether queries and passages can both be named by id."""
        return len(self._tables) == 2

    def query(self, row: TrainingRow) -> str:
        """Returns a row's query as text."""
        if not isinstance(row.query, ById):
            return row.query
        number = self._find(row, "queries", row.query.id, "queries")
        text: str = self._queries[number]
        return text

    def passage(self, row: TrainingRow, passage: Passage | ById) -> int:
        """Returns the number of one of a row's passages, which is stored if it is a text."""
        if isinstance(passage, ById):
            return self._find(row, "corpus", passage.id, "documents")
        return self._passages.add([passage.title, passage.text])

    def _find(self, row: TrainingRow, where: str, identifier: str, what: str) -> int:
        if where not in self._tables:
            raise DataError(row.path, row.line, f"names {what} by their ids; give --{where}, where they stand")
        number = self._tables[where].find(identifier)
        if number is None:
            missing = "the corpus has no document" if where == "corpus" else "the queries have none"
            raise DataError(row.path, row.line, f"{missing} with the id {identifier!r}")
        return number
