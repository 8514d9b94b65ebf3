"""From raw rows to documents, with the one list of what makes a row bad."""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llara.data.lines import MAX_LINE_BYTES, digest
from llara.data.rows import Row, as_id, read_rows
from llara.errors import DataError
from llara.records import Document

_CONTROL = ("Cc", "Zl", "Zp")  # Unicode categories: control characters, line and paragraph separators


def read_documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Yields the documents of the corpora; DataError at the first bad row or repeated id.

    Keeps 16 bytes per document in memory, to find repeated ids.
    """
    seen: set[bytes] = set()
    for row in read_rows(paths):
        document = parse_document(row)
        key = digest(document.id.encode())
        if key in seen:
            raise DataError(row.path, row.line, f"duplicate document id {document.id!r}")
        seen.add(key)
        yield document


def parse_document(row: Row, *, needs_id: bool = True) -> Document:
    """Returns the document of one row; DataError(path, line, reason) where there is none.

    Where `needs_id` is False, a JSON object without an id gets its place as id: `path:line`.

    A row with `question` and `answer` and no `text` is a labelled pair: its answer is the text. Its focus stays in the
    metadata: as a title it would give the question away.
    """
    if row.kind == "text":
        name, _, data = row.data.partition(b"\n")
        return Document(name.decode(), check_text(row, decode(row, data), "passage"))
    if row.kind == "tsv":
        return _from_columns(row)
    # An oversize row fails in here, as it would have in any of the above.
    return _from_object(row, parse_object(row), None if needs_id else as_id(f"{row.path}:{row.line}"))


def decode(row: Row, data: bytes) -> str:
    """Returns bytes of a row as text; DataError for a row that was too long to keep, or a byte that is not UTF-8."""
    if row.kind == "oversize":
        size = int(row.data.split()[0])
        _bad(row, f"the row has {size:,} bytes; at most {MAX_LINE_BYTES:,} are read")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        _bad(row, f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}")


def parse_object(row: Row) -> dict[str, Any]:
    """Returns the JSON object that a row holds; DataError where it holds anything else."""
    text = decode(row, row.data)
    if not text.strip():
        _bad(row, "blank line")
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        advice = "; each line must hold a whole object" if text.strip() in ("{", "[", "[{") else ""
        _bad(row, f"broken JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}{advice}")
    except ValueError as error:  # NaN, or a number of thousands of digits
        _bad(row, f"broken JSON: {error}")
    except RecursionError:
        _bad(row, "broken JSON: nested too deeply")
    if not isinstance(value, dict):
        _bad(row, f"not a JSON object but {json_type(value)}")
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(row, value)
    return value


def check_id(row: Row, value: Any, what: str = "document") -> str:
    """Returns an id as text. White space is refused, for the files of TREC are separated by it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        _bad(row, f"the {what} id is not a string or a number but {json_type(value)}")
    text = str(value)
    if not text:
        _bad(row, f"the {what} id is empty")
    if any(char.isspace() or unicodedata.category(char) in _CONTROL for char in text):
        _bad(row, f"the {what} id {text!r} holds white space or a control character")
    return text


def check_text(row: Row, value: Any, what: str, field: str = "text", title: str = "") -> str:
    """Returns a text that can be encoded: not missing, without NUL, and not empty, unless a title stands for it."""
    if value is None:
        _bad(row, f"no {field}")
    if not isinstance(value, str):
        _bad(row, f"the field {field} is not text but {json_type(value)}")
    if "\x00" in value:
        _bad(row, f"the field {field} holds a NUL character at offset {value.index(chr(0))}")
    if not value.strip() and not title.strip():
        _bad(row, f"empty {what}")
    return value


def check_title(row: Row, value: Any, field: str = "title") -> str:
    """Returns a title that can stand in front of a text: empty where there is none, text without NUL."""
    if value is None:
        return ""
    if not isinstance(value, str):
        _bad(row, f"the field {field} is not text but {json_type(value)}")
    if "\x00" in value:
        _bad(row, f"the field {field} holds a NUL character at offset {value.index(chr(0))}")
    return value


def take_id(row: Row, fields: dict[str, Any], what: str = "document", default: str | None = None) -> str:
    """Removes the field `_id`, or else `id`, or else `docid` (Tevatron's), and returns it, checked."""
    for name in ("_id", "id", "docid"):
        if name in fields:
            return check_id(row, fields.pop(name), what)
    if default is not None:
        return default
    _bad(row, "no id (neither the field _id nor id)")


def pair_id(fields: dict[str, Any], row_id: str) -> str:
    """Returns the document id of a labelled pair: its own, then a checksum of its question.

    Collections of pairs number their questions per source (MedQuAD repeats a quarter of its ids), so an id alone does
    not name a row. Question text does, and stays the same when rows are added or moved.
    """
    return f"{row_id}-{digest(str(fields['question']).encode()).hex()[:8]}"


def is_pair(fields: dict[str, Any]) -> bool:
    """Tells whether a JSON object is a labelled pair rather than a document."""
    return "question" in fields and "answer" in fields and "text" not in fields


def json_type(value: Any) -> str:
    """Returns what a JSON value is, for an error message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _from_object(row: Row, fields: dict[str, Any], default_id: str | None) -> Document:
    document_id = take_id(row, fields, default=default_id)
    if is_pair(fields):
        check_text(row, fields["question"], "question", "question")
        document_id = pair_id(fields, document_id)
        text = check_text(row, fields.pop("answer"), "answer", "answer")
        del fields["question"]
        return Document(document_id, text, "", fields)
    text, title = fields.pop("text", None), check_title(row, fields.pop("title", None))
    text = check_text(row, text, "passage", title=title)
    if isinstance(fields.get("metadata"), dict):
        fields = {**fields.pop("metadata"), **fields}
    return Document(document_id, text, title, fields)


def _from_columns(row: Row) -> Document:
    line = decode(row, row.data)
    if not line.strip():
        _bad(row, "blank line")
    columns = line.split("\t")
    if len(columns) not in (2, 3, 4):
        wanted = "2 (id, text), 3 (id, title, text) or 4 (id, url, title, body)"
        _bad(row, f"{len(columns)} tab-separated columns; expected {wanted}")
    if "\x00" in line:
        _bad(row, f"the row holds a NUL character at offset {line.index(chr(0))}")
    title = columns[-2] if len(columns) > 2 else ""
    metadata = {"url": columns[1]} if len(columns) == 4 else {}
    return Document(check_id(row, columns[0]), check_text(row, columns[-1], "passage", title=title), title, metadata)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _check_surrogates(row: Row, value: dict[str, Any]) -> None:
    # Half of an escaped surrogate pair parses, but is no character: no tokenizer and no file takes it.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        _bad(row, f"half of a surrogate pair: \\u{ord(error.object[error.start]):04x} is not a character")


def _bad(row: Row, reason: str) -> NoReturn:
    raise DataError(row.path, row.line, reason)
