"""What makes a row bad, with the message of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.documents import parse_document, read_documents
from llara.data.rows import Row, as_id, read_rows
from llara.errors import DataError
from llara.records import Document

Write = Callable[[str, Any], Path]

BAD_JSON = [
    (b'{"_id": "a", "text": }', "broken JSON: Expecting value at column 22"),
    (b'{"_id": "a"', "broken JSON: Expecting ',' delimiter at column 12"),
    (b'{"_id": "a\x00"}', "broken JSON: Invalid control character at column 11"),
    (b"", "blank line"),
    (b"  \t", "blank line"),
    (b'["a"]', "not a JSON object but a list"),
    (b'"a"', "not a JSON object but a string"),
    (b"3", "not a JSON object but a number"),
    (b"null", "not a JSON object but null"),
    (b"[" * 100_000, "broken JSON: nested too deeply"),
    (b'{"text": "x"}', "no id (neither the field _id nor id)"),
    (b'{"_id": null, "text": "x"}', "the document id is not a string or a number but null"),
    (b'{"_id": true, "text": "x"}', "the document id is not a string or a number but true or false"),
    (b'{"_id": ["a"], "text": "x"}', "the document id is not a string or a number but a list"),
    (b'{"_id": "", "text": "x"}', "the document id is empty"),
    (b'{"_id": "a b", "text": "x"}', "the document id 'a b' holds white space or a control character"),
    (b'{"_id": "a\\u00a0b", "text": "x"}', "the document id 'a\\xa0b' holds white space or a control character"),
    (b'{"_id": "a\\u0001", "text": "x"}', "the document id 'a\\x01' holds white space or a control character"),
    (b'{"_id": "a"}', "no text"),
    (b'{"_id": "a", "text": null}', "no text"),
    (b'{"_id": "a", "text": 5}', "the field text is not text but a number"),
    (b'{"_id": "a", "text": ["x"]}', "the field text is not text but a list"),
    (b'{"_id": "a", "text": " \\n "}', "empty passage"),
    (b'{"_id": "a", "title": " ", "text": ""}', "empty passage"),
    (b'{"_id": "a", "title": "t"}', "no text"),
    (b'{"_id": "a", "text": "ab\\u0000c"}', "the field text holds a NUL character at offset 2"),
    (b'{"_id": "a", "text": "x", "title": 3}', "the field title is not text but a number"),
    (b'{"_id": "a", "text": "x", "title": "\\u0000"}', "the field title holds a NUL character at offset 0"),
    (b'{"_id": "a", "text": "caf\xe9"}', "not UTF-8: byte 0xe9 at offset 25"),
    (b'{"_id": "a", "text": "x\\ud83d"}', "half of a surrogate pair: \\ud83d is not a character"),
    (b'{"_id": "a", "text": "x", "more": ["\\uDE00"]}', "half of a surrogate pair: \\ude00 is not a character"),
    (b'{"_id": "a", "text": "x", "score": NaN}', "broken JSON: NaN is not a JSON value"),
    (b'{"_id": "a", "question": "q", "answer": " "}', "empty answer"),
    (b'{"_id": "a", "question": "", "answer": "x"}', "empty question"),
]

BAD_TSV = [
    (b"", "blank line"),
    (b"only", "1 tab-separated columns; expected 2 (id, text), 3 (id, title, text) or 4 (id, url, title, body)"),
    (
        b"a\tb\tc\td\te",
        "5 tab-separated columns; expected 2 (id, text), 3 (id, title, text) or 4 (id, url, title, body)",
    ),
    (b"\ttext", "the document id is empty"),
    (b"a b\ttext", "the document id 'a b' holds white space or a control character"),
    (b"a\t ", "empty passage"),
    (b"a\t \t", "empty passage"),
    (b"a\tx\x00", "the row holds a NUL character at offset 3"),
    (b"a\t\xff", "not UTF-8: byte 0xff at offset 2"),
]

BAD_TEXT = [
    (b"n-1\nab\xff", "not UTF-8: byte 0xff at offset 2"),
    (b"n-1\na\x00", "the field text holds a NUL character at offset 1"),
    (b"n-1\n \n", "empty passage"),
]


def reason(kind: str, data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        parse_document(Row("dir/file", 12, data, kind))
    assert (caught.value.path, caught.value.line) == ("dir/file", 12)
    assert str(caught.value) == f"dir/file:12: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize(("data", "expected"), BAD_JSON)
def test_bad_json_rows(data: bytes, expected: str) -> None:
    assert reason("json", data) == expected


@pytest.mark.parametrize(("data", "expected"), BAD_TSV)
def test_bad_tsv_rows(data: bytes, expected: str) -> None:
    assert reason("tsv", data) == expected


@pytest.mark.parametrize(("data", "expected"), BAD_TEXT)
def test_bad_plain_text(data: bytes, expected: str) -> None:
    assert reason("text", data) == expected


def test_a_number_of_thousands_of_digits_is_broken_json() -> None:
    assert reason("json", b'{"_id": %s, "text": "x"}' % (b"9" * 5000)).startswith("broken JSON: Exceeds the limit")


def test_escaped_pairs_of_surrogates_are_characters() -> None:
    row = Row("f", 1, b'{"_id": "a", "text": "\\ud83d\\ude00 and \\\\ud83d"}', "json")
    assert parse_document(row).text == "\U0001f600 and \\ud83d"


def test_a_title_may_stand_without_text() -> None:
    row = Row("f", 1, b'{"_id": "a", "title": "On fire", "text": ""}', "json")
    assert parse_document(row) == Document("a", "", "On fire", {})
    assert parse_document(Row("f", 1, b"a\tOn fire\t", "tsv")) == Document("a", "", "On fire")


def test_fields_beyond_the_text_become_metadata() -> None:
    row = Row(
        "f", 1, b'{"_id": "a", "id": 4, "text": "x", "title": null, "metadata": {"url": "u", "n": 1}, "n": 2}', "json"
    )
    assert parse_document(row) == Document("a", "x", "", {"url": "u", "n": 2, "id": 4})
    row = Row("f", 1, b'{"_id": 1.5, "text": "x", "metadata": "m"}', "json")
    assert parse_document(row) == Document("1.5", "x", "", {"metadata": "m"})


def test_a_pair_gives_its_answer_and_hides_its_focus_from_the_text() -> None:
    data = b'{"_id": "7", "source": "S", "focus": "Gout", "question": "What is gout?", "answer": "A disease."}'
    document = parse_document(Row("f", 1, data, "json"))
    assert document == Document(document.id, "A disease.", "", {"source": "S", "focus": "Gout"})
    assert document.id == "7-90e91f86"


def test_pairs_with_one_id_differ_by_question() -> None:
    rows = [b'{"_id": "7", "question": "Q%d", "answer": "A"}' % n for n in range(3)]
    assert len({parse_document(Row("f", 1, data, "json")).id for data in rows}) == 3


def test_reading_stops_at_the_first_bad_row(write: Write) -> None:
    path = write("c.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b"}\n{"_id": "c", "text": "x"}\n')
    reader = read_documents([path])
    assert next(reader).id == "a"
    with pytest.raises(DataError) as caught:
        next(reader)
    assert str(caught.value) == f"{path}:2: no text"


def test_a_repeated_id_is_an_error_across_files(write: Write) -> None:
    first = write("a.jsonl", [{"_id": "1", "text": "x"}, {"_id": "2", "text": "y"}])
    second = write("b.tsv", "3\tx\n1\ty\n")
    with pytest.raises(DataError) as caught:
        list(read_documents([first, second]))
    assert str(caught.value) == f"{second}:2: duplicate document id '1'"


def test_a_place_serves_as_id_where_none_is_needed(write: Write) -> None:
    path = write("my corpus.jsonl", [{"text": "one"}, {"_id": "b", "text": "two"}, {"text": 3}])
    one, two, bad = read_rows([path])
    assert parse_document(one, needs_id=False) == Document(as_id(f"{path}:1"), "one")
    assert parse_document(two, needs_id=False).id == "b"
    with pytest.raises(DataError, match=r"jsonl:3: the field text is not text but a number"):
        parse_document(bad, needs_id=False)
    with pytest.raises(DataError, match=r"jsonl:1: no id"):
        parse_document(one)
