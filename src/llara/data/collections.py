"""Collections: a corpus with queries and judgements, whatever the layout on disk.

`open_collection` tells the layouts apart; `read_queries` and `read_qrels` take a collection or a plain file.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from llara.data.documents import is_pair, parse_document, parse_object, read_documents
from llara.data.lines import digest, plain_name, read_lines
from llara.data.queries import read_query_file
from llara.data.rows import beir_file, format_of, read_rows, squad_paragraphs
from llara.data.splits import Split, is_dev_query, normalise, split_by_focus
from llara.data.trec import QrelLine, read_qrel_lines
from llara.errors import ConfigError, DataError, nearest
from llara.records import Document, Qrel, Query


class Collection(Protocol):
    """A corpus with queries and judgements, in one or more splits."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""

    def documents(self) -> Iterator[Document]:
        """Yields the corpus; it is the same for all splits."""

    def queries(self, split: str | None = None) -> list[Query]:
        """Returns the queries that the split judges, or all."""

    def qrels(self, split: str) -> list[Qrel]:
        """Returns the judgements of the split. An unknown split is a DataError that names those there are."""


class BeirCollection:
    """A BEIR folder: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`, each also as `.gz`.

    Without `qrels/dev.tsv`, a fixed fifth of the queries of `train` is `dev` and the rest `train`; `train-all` is the
    file as it stands.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        found = (self.path / "qrels").glob("*")
        files = [item for item in found if plain_name(item).endswith(".tsv") and item.is_file()]
        names = {item.name.removesuffix(".gz").removesuffix(".tsv") for item in files}
        return tuple(sorted(names | ({"dev", "train-all"} if "train" in names else set())))

    def documents(self) -> Iterator[Document]:
        """See `Collection.documents`."""
        return read_documents([self.path])

    def queries(self, split: str | None = None) -> list[Query]:
        """See `Collection.queries`."""
        path = beir_file(self.path, "queries.jsonl")
        if path is None:
            raise DataError(self.path, None, "the BEIR folder holds no queries.jsonl")
        queries = read_query_file(path)
        if split is None:
            return queries
        judged = {qrel.query_id for qrel in self.qrels(split)}
        return [query for query in queries if query.id in judged]

    def qrels(self, split: str) -> list[Qrel]:
        """See `Collection.qrels`. A judgement of a query that is not in the queries file is a DataError."""
        known = {query.id for query in self.queries()}
        lines = self.qrel_lines(split)
        for number, qrel in lines:
            if qrel.query_id not in known:
                raise DataError(self.qrels_path(split), number, f"no query has the id {qrel.query_id!r}")
        return [item.qrel for item in lines]

    def qrel_lines(self, split: str) -> list[QrelLine]:
        """Returns the judgements of the split with their lines in `qrels_path`."""
        lines = read_qrel_lines(self.qrels_path(split))
        if split not in ("train", "dev") or beir_file(self.path, "qrels/dev.tsv"):
            return lines
        return [item for item in lines if is_dev_query(item.qrel.query_id) == (split == "dev")]

    def qrels_path(self, split: str) -> Path:
        """Returns the file that holds the judgements of the split; DataError where there is none."""
        check_split(self, split)
        path = beir_file(self.path, f"qrels/{split}.tsv") or beir_file(self.path, "qrels/train.tsv")
        assert path is not None, "check_split lets only known splits through"
        return path


class JudgedCollection:
    """A collection whose judgements follow from its rows: each query came with its document(s).

    path: where it was read from. questions: split → (query, ids of its documents), in the order of the file.
    """

    def __init__(self, path: Path, questions: dict[str, list[tuple[Query, list[str]]]]) -> None:
        self.path = path
        self._questions = questions

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._questions)

    def documents(self) -> Iterator[Document]:
        """See `Collection.documents`."""
        return read_documents([self.path])

    def queries(self, split: str | None = None) -> list[Query]:
        """See `Collection.queries`."""
        names = self.splits if split is None else (check_split(self, split),)
        return [query for name in names for query, _ in self._questions[name]]

    def qrels(self, split: str) -> list[Qrel]:
        """See `Collection.qrels`."""
        questions = self._questions[check_split(self, split)]
        return [Qrel(query.id, document_id, 1) for query, relevant in questions for document_id in relevant]


def open_collection(path: Path) -> Collection | None:
    """Returns the collection at `path`: a BEIR folder, a pairs file or SQuAD JSON; None for anything else.

    DataError where the file or folder is missing, or a collection by its look but broken.
    """
    path = Path(path)
    kind = _kind_of(path)
    return None if kind is None else _OPENERS[kind](path)


def is_collection(path: Path) -> bool:
    """Tells whether there is a collection at `path`, by the look of it: no more than its first row is read."""
    return _kind_of(Path(path)) is not None


def refuse_splits(flag: str, split: str | None, default: str | None, paths: Sequence[Path]) -> None:
    """Refuses a split that was asked for where none of the paths is a collection, which alone has splits.

    Raises:
        ConfigError: All rows would be taken, and the split passed over in silence.
        DataError: A path is missing or unreadable.
    """
    if split != default and not any(is_collection(path) for path in paths):
        listed = ", ".join(map(str, paths))
        raise ConfigError(f"{flag}: {split!r} would be the split of a collection, and {listed} has none; leave it out")


def read_queries(path: Path, split: str | None = None) -> list[Query]:
    """Returns the queries of a collection (all, or those that `split` judges) or of a plain file (see `queries.py`).

    DataError with file and line for a bad row, a repeated id, or a judgement of an unknown query.
    """
    collection = open_collection(path)
    if collection is not None:
        return collection.queries(split)
    if split is not None:
        raise DataError(path, None, f"a plain file has no splits, so there is no split {split!r}")
    return read_query_file(Path(path))


def read_qrels(path: Path, split: str = "test") -> list[Qrel]:
    """Returns the judgements of a split of a collection, or of a plain file (`split` does not matter then).

    DataError with file and line for a bad row (see `trec.read_qrel_lines`).
    """
    collection = open_collection(path)
    if collection is not None:
        return collection.qrels(split)
    return [item.qrel for item in read_qrel_lines(Path(path))]


def check_split(collection: Collection, split: str) -> str:
    """Returns `split`; DataError naming the splits there are where the collection has no such one."""
    names = collection.splits
    if split not in names:
        known = f"it has {', '.join(names)}" if names else "it has no judgements"
        raise DataError(collection.path, None, f"no split {split!r}{nearest(split, names)}; {known}")
    return split


def _kind_of(path: Path) -> str | None:
    if path.is_dir():
        return "beir" if beir_file(path, "corpus.jsonl") else None
    if not path.exists():
        raise DataError(path, None, "no such file or folder")
    if plain_name(path).endswith((".tsv", ".txt", ".md", ".parquet")) or not _starts_with_brace(path):
        return None
    if format_of(path) == "squad":
        return "squad"
    return "pairs" if _is_pairs_file(path) else None


def _starts_with_brace(path: Path) -> bool:
    return next(read_lines(path)).data.lstrip().startswith(b"{")


def _is_pairs_file(path: Path) -> bool:
    """Tells a pairs file by its first row; a broken one is left to the reader of plain files, which names the line."""
    try:
        value = json.loads(next(read_lines(path)).data)
    except ValueError:
        return False
    return isinstance(value, dict) and is_pair(value)


def _open_squad(path: Path) -> JudgedCollection:
    """All questions are one split, `test`."""
    questions: list[tuple[Query, list[str]]] = []
    seen: set[str] = set()
    for paragraph in squad_paragraphs(path):
        for query_id, text in paragraph["questions"]:
            if query_id in seen:
                raise DataError(path, None, f"duplicate question id {query_id!r}")
            if not query_id.strip() or not text.strip():
                raise DataError(path, None, f"empty question or question id in the paragraph {paragraph['_id']!r}")
            seen.add(query_id)
            questions.append((Query(query_id, text), [paragraph["_id"]]))
    return JudgedCollection(path, {"test": questions})


def _open_pairs(path: Path) -> JudgedCollection:
    """Each question is a query; relevant to it is its answer, and every document with the same text.

    A question asked several times within a split is one query, to which all its answers are relevant. Equal text counts
    because a system that returns the twin of the right document has answered the question.

    A row of train whose answer is also one of dev or test is dropped, though its document stays: MedQuAD gives the same
    boilerplate answer for many diseases, and a text seen as a positive in training must not be what is asked for later.
    """
    same_text: dict[bytes, list[str]] = defaultdict(list)
    answers: dict[tuple[Split, str], dict[bytes, None]] = defaultdict(dict)
    first: dict[tuple[Split, str], Query] = {}
    seen: dict[str, int] = {}
    for row in read_rows([path]):
        fields = parse_object(row)
        if not is_pair(fields):
            raise DataError(row.path, row.line, "a pair has the fields question and answer, and no text")
        document = parse_document(row)
        if seen.setdefault(document.id, row.line) != row.line:
            reason = f"the same _id and question as in line {seen[document.id]}"
            raise DataError(row.path, row.line, reason)
        text = digest(normalise(document.text).encode())
        same_text[text].append(document.id)
        asked = (split_by_focus(str(fields.get("focus") or "")), normalise(fields["question"]))
        first.setdefault(asked, Query(f"q-{document.id}", fields["question"]))
        answers[asked][text] = None
    held_out = {text for (split, _), texts in answers.items() if split != "train" for text in texts}
    questions: dict[str, list[tuple[Query, list[str]]]] = {"train": [], "dev": [], "test": []}
    for asked, query in first.items():
        kept = [text for text in answers[asked] if asked[0] != "train" or text not in held_out]
        if kept:
            questions[asked[0]].append((query, [document_id for text in kept for document_id in same_text[text]]))
    return JudgedCollection(path, questions)


_OPENERS: dict[str, Callable[[Path], Collection]] = {
    "beir": BeirCollection,
    "squad": _open_squad,
    "pairs": _open_pairs,
}
