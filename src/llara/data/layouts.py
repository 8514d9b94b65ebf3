"""The layouts of training data, row by row: texts as they stand, or ids of a corpus and of queries.

JSON lines (or parquet), told apart by the fields of each row; all may hold `pos_scores` and `neg_scores`:

    query, pos, neg                                             FlagEmbedding's, and what `llara mine` writes
    query, positive_passages, negative_passages                 Tevatron's, with the passages' titles and texts
    query_text, positive_document_ids, negative_document_ids    Tevatron's, with a corpus apart
    query, text                                                 pairs

Tab-separated columns, told apart by their number, the same in every row:

    2: query, text      3: query, positive, negative (MS MARCO's triples)
    4: query 0 document relevance (TREC's and MS MARCO's judgements), which are always ids

The columns of the first two are ids where a corpus and queries are given, else texts.
"""

import difflib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from llara.data.documents import check_id, check_text, check_title, decode, json_type, parse_object
from llara.data.numbers import fits_float32, is_whole
from llara.data.rows import Row, read_rows
from llara.errors import DataError, nearest
from llara.records import Passage

KNOWN = (
    "training data is JSON lines with query, pos, neg, or of Tevatron's layouts, a .tsv of pairs or triples, "
    "or a collection (BEIR folder, pairs, SQuAD JSON)"
)
# The fields that hold passages, by layout in the order in which they count; and what stands for negatives elsewhere.
_PASSAGES = {
    "positive_document_ids": ("positive_document_ids", "negative_document_ids"),
    "positive_passages": ("positive_passages", "negative_passages"),
    "pos": ("pos", "neg"),
    "text": ("text",),
}
_SCORES = ("pos_scores", "neg_scores")
_FIELDS = {"query", "query_text", "query_id", *_SCORES, *(name for names in _PASSAGES.values() for name in names)}
_LISTS = "name passages with negatives or scores pos and neg, each a list"
_NEGATIVES = ("negs", "negative", "negatives", "hard_negative", "hard_negatives")
_MEDIA = ("query_image", "query_video", "query_audio")


class ById(NamedTuple):
    """A query or a passage that stands elsewhere, under this id."""

    id: str


class TrainingRow(NamedTuple):
    """One training example as its file has it; scores are there for all passages or for none."""

    path: str
    line: int
    query: str | ById
    positives: tuple[Passage | ById, ...]
    negatives: tuple[Passage | ById, ...] = ()
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()


def read_training_rows(path: Path, *, ids: bool = False) -> Iterator[TrainingRow]:
    """Yields the training examples of a file, in order, streaming. A query's judgements that follow each other are one.

    Args:
        path: JSON lines, parquet or tsv.
        ids: Whether the columns of a tsv are ids.

    Raises:
        DataError: A row that does not fit its layout, with file and line: no positive, empty text, a text or number
            where a list belongs, a negative that is a positive, scores that are not as many as passages, passages or
            scores under the names of another layout, a field whose name is misspelt.
    """
    columns = 0
    judged: list[tuple[Row, list[str]]] = []
    for row in read_rows([path]):
        if row.kind == "text":
            raise DataError(path, None, KNOWN)
        if row.kind != "tsv":
            yield _from_object(row)
            continue
        values = _columns(row, columns)
        columns = columns or len(values)
        if columns != 4:
            yield _from_columns(row, values, ids=ids)
            continue
        if judged and judged[0][1][0] != values[0]:
            yield from _from_judgements(judged)
            judged = []
        judged.append((row, values))
    yield from _from_judgements(judged)


# JSON ---------------------------------------------------------------------------------------------------------------


def _from_object(row: Row) -> TrainingRow:
    fields = parse_object(row)
    # A field that is empty says nothing where another layout's is filled; alone it is an error of its own layout.
    there = [name for name in _PASSAGES if name in fields]
    layout = next((name for name in there if _filled(fields[name])), there[0] if there else "pos")
    if layout == "positive_document_ids":
        return _from_ids(row, fields)
    if layout == "text" and "query" in fields:
        return _from_pair(row, fields)
    if layout == "positive_passages":
        return _from_texts(row, fields, "query", "positive_passages", "negative_passages")
    return _from_texts(row, fields, "query", "pos", "neg")


def _from_pair(row: Row, fields: dict[str, Any]) -> TrainingRow:
    _check_names(row, fields, "text")
    query = check_text(row, fields["query"], "query", "query")
    return TrainingRow(row.path, row.line, query, (Passage(check_text(row, fields["text"], "passage")),))


def _from_texts(row: Row, fields: dict[str, Any], query_field: str, pos: str, neg: str) -> TrainingRow:
    for name in (query_field, pos):
        if name not in fields:
            _bad(row, f"no field {name}{nearest(name, fields)}")
    query = check_text(row, fields[query_field], "query", query_field)
    positives = _passages(row, pos, fields[pos])
    negatives = () if fields.get(neg) is None else _passages(row, neg, fields[neg])
    return _checked(row, query, positives, negatives, fields, pos, neg)


def _from_ids(row: Row, fields: dict[str, Any]) -> TrainingRow:
    other = next((name for name in _MEDIA if fields.get(name) is not None), None)
    if other is not None:
        _bad(row, f"holds a {other}; queries are text")
    name = "query" if "query_text" not in fields and "query" in fields else "query_text"
    query = check_text(row, fields.get(name), "query", name)
    pos, neg = "positive_document_ids", "negative_document_ids"
    positives = _ids(row, pos, fields[pos])
    negatives = () if fields.get(neg) is None else _ids(row, neg, fields[neg])
    return _checked(row, query, positives, negatives, fields, pos, neg)


def _checked(
    row: Row,
    query: str,
    positives: tuple[Passage | ById, ...],
    negatives: tuple[Passage | ById, ...],
    fields: dict[str, Any],
    pos: str,
    neg: str,
) -> TrainingRow:
    """Returns the row, once its parts fit each other."""
    if not positives:
        _bad(row, f"{pos} is empty: an example needs at least one relevant passage")
    same = {_compared(passage) for passage in positives}
    for number, passage in enumerate(negatives):
        if _compared(passage) in same:
            shown = passage.id if isinstance(passage, ById) else passage.text[:60]
            _bad(row, f"{neg}[{number}] is also a positive: {shown!r}")
    _check_names(row, fields, pos)
    of_positives = _scores(row, "pos_scores", fields, positives, pos)
    of_negatives = _scores(row, "neg_scores", fields, negatives, neg)
    if of_positives and negatives and not of_negatives:
        _bad(row, "has pos_scores but no neg_scores; a teacher scores all passages of a row, or none")
    if of_negatives and not of_positives:
        _bad(row, "has neg_scores but no pos_scores; a teacher scores all passages of a row, or none")
    return TrainingRow(row.path, row.line, query, positives, negatives, of_positives, of_negatives)


def _check_names(row: Row, fields: dict[str, Any], layout: str) -> None:
    """Refuses passages and scores under a name that the layout does not read: they would be left out silently.

    Empty lists and nulls may stay, for a table has all columns in every row; so may a `text`, which is often metadata.
    """
    read = _PASSAGES[layout]
    for first, names in _PASSAGES.items():
        other = next((name for name in names if _filled(fields.get(name))), None)
        if first in (layout, "text") or other is None:
            continue
        advice = (
            "keep one of the two" if other == first else f"rename {other} to {read[1]}" if len(read) > 1 else _LISTS
        )
        _bad(row, f"holds {other} beside {layout}, which are of different layouts; {advice}")
    scores = next((name for name in _SCORES if layout == "text" and _filled(fields.get(name))), None)
    if scores is not None:
        _bad(row, f"holds {scores} beside text, which has none; {_LISTS}")
    names = tuple(name for name, value in fields.items() if _filled(value))
    misspelt = _misspelt(names, ("neg",) if layout == "text" else (*read[1:], *_SCORES))
    if misspelt is not None:
        _bad(row, "no field {}, but {!r}; rename it".format(*misspelt))


def _filled(value: Any) -> bool:
    return value is not None and value != [] and value != ""


@functools.lru_cache
def _misspelt(names: tuple[str, ...], optional: tuple[str, ...]) -> tuple[str, str] | None:
    """Returns an optional field that a row lacks, and the name in the row that can only stand for it.

    The row would be read without it, and nobody would know; a required field is missed anyhow.
    """
    others = [name for name in names if name not in _FIELDS]
    for missing in optional:
        if missing in names:
            continue
        found = difflib.get_close_matches(missing, others, n=1, cutoff=0.8)
        if missing not in _SCORES:
            found += [name for name in others if name.lower() in _NEGATIVES]
        if found:
            return missing, found[0]
    return None


def _list(row: Row, field: str, value: Any, of: str) -> list[Any]:
    if not isinstance(value, list):
        _bad(row, f"the field {field} must be a list of {of}, but is {json_type(value)}")
    return value


def _passages(row: Row, field: str, value: Any) -> tuple[Passage, ...]:
    items = _list(row, field, value, "texts or of objects with title and text")
    return tuple(_passage(row, f"{field}[{number}]", item) for number, item in enumerate(items))


def _passage(row: Row, field: str, value: Any) -> Passage:
    if isinstance(value, str):
        return Passage(check_text(row, value, f"passage in {field}", field))
    if not isinstance(value, dict):
        _bad(row, f"{field} is neither text nor an object with text but {json_type(value)}")
    title = check_title(row, value.get("title"), f"{field}.title")
    return Passage(check_text(row, value.get("text"), f"passage in {field}", f"{field}.text", title), title)


def _ids(row: Row, field: str, value: Any) -> tuple[ById, ...]:
    return tuple(ById(check_id(row, item)) for item in _list(row, field, value, "document ids"))


def _scores(
    row: Row, field: str, fields: dict[str, Any], passages: tuple[Passage | ById, ...], of: str
) -> tuple[float, ...]:
    if fields.get(field) is None:
        return ()
    values = _list(row, field, fields[field], "numbers")
    if len(values) != len(passages):
        _bad(row, f"{field} holds {len(values)} scores for the {len(passages)} passages in {of}")
    for number, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            _bad(row, f"{field}[{number}] is not a number but {json_type(value)}")
        if not fits_float32(value):
            _bad(row, f"{field}[{number}] is not a finite float32 number")
    return tuple(float(value) for value in values)


# Columns ------------------------------------------------------------------------------------------------------------


def _columns(row: Row, expected: int) -> list[str]:
    line = decode(row, row.data)
    if not line.strip():
        _bad(row, "blank line")
    values = line.split("\t")
    if len(values) not in (2, 3, 4):
        wanted = "2 (query, text), 3 (query, positive, negative) or 4 (query 0 document relevance)"
        _bad(row, f"{len(values)} tab-separated columns; training data has {wanted}")
    if expected and len(values) != expected:
        _bad(row, f"{len(values)} columns where the rows before have {expected}")
    return values


def _from_columns(row: Row, values: list[str], *, ids: bool) -> TrainingRow:
    query: str | ById
    passages: tuple[Passage | ById, ...]
    if ids:
        query, *others = (ById(check_id(row, value, "column's")) for value in values)
        passages = tuple(others)
    else:
        if all(value.isdecimal() for value in values):
            _bad(row, "the columns look like ids; say what they stand for with --queries and --corpus")
        names = ("query", "positive", "negative")
        query, *texts = (check_text(row, value, name, name) for name, value in zip(names, values, strict=False))
        passages = tuple(Passage(text) for text in texts)
    if len(passages) == 2 and _compared(passages[0]) == _compared(passages[1]):
        _bad(row, "the negative is also the positive")
    return TrainingRow(row.path, row.line, query, passages[:1], passages[1:])


def _from_judgements(judged: list[tuple[Row, list[str]]]) -> Iterator[TrainingRow]:
    """Yields the example of one query's judgements, if it has a relevant document."""
    relevant = []
    for row, (_, _, document_id, relevance) in judged:
        if not is_whole(relevance):
            _bad(row, f"the relevance {relevance!r} is not a whole number")
        if int(relevance) > 0:
            relevant.append(ById(check_id(row, document_id)))
    if relevant:
        first, values = judged[0]
        yield TrainingRow(first.path, first.line, ById(check_id(first, values[0], "query")), tuple(relevant))


def _compared(passage: Passage | ById) -> str:
    """Returns what makes two passages of a row the same: its id, or what is read of it, the title before the text."""
    return passage.id if isinstance(passage, ById) else f"{passage.title.strip()} {passage.text.strip()}".strip()


def _bad(row: Row, reason: str) -> NoReturn:
    raise DataError(row.path, row.line, reason)
