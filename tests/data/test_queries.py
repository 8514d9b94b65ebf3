"""Queries from plain files and collections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.collections import read_queries
from llara.errors import DataError
from llara.records import Query

Write = Callable[[str, Any], Path]


def test_plain_query_files(write: Write) -> None:
    expected = [Query("1", "what"), Query("b", "why")]
    assert read_queries(write("q.jsonl", [{"_id": 1, "text": "what"}, {"id": "b", "query": "why", "x": 1}])) == expected
    assert read_queries(write("q.tsv.gz", "1\twhat\nb\twhy\n")) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "q.jsonl",
            '{"_id": "1", "text": "x"}\n{"_id": "1", "text": "y"}\n',
            ":2: duplicate query id '1', first in line 1",
        ),
        ("q.jsonl", '{"_id": "1", "text": "x"}\n\n', ":2: blank line"),
        ("q.jsonl", '{"_id": "1", "text": " "}\n', ":1: empty query"),
        ("q.jsonl", '{"_id": "1", "query": 2}\n', ":1: the field query is not text but a number"),
        ("q.jsonl", '{"_id": "1"}\n', ":1: no text"),
        ("q.jsonl", '{"text": "x"}\n', ":1: no id (neither the field _id nor id)"),
        ("q.jsonl", '{"_id": "1 2", "text": "x"}\n', ":1: the query id '1 2' holds white space or a control character"),
        ("q.tsv", "1\tx\n2\n", ":2: 1 tab-separated columns; a query has 2 (id, text)"),
        ("q.tsv", "1\tx\n\n", ":2: blank line"),
        ("q.tsv", "1\tx\n2\t\n", ":2: empty query"),
        ("q.txt", "what is this\n", ": queries are JSON lines (_id, text), a .tsv (id, text), or a collection"),
        ("q.jsonl", "", ": the file is empty"),
    ],
)
def test_bad_query_files(write: Write, name: str, text: str, expected: str) -> None:
    path = write(name, text)
    with pytest.raises(DataError) as caught:
        read_queries(path)
    assert str(caught.value) == f"{path}{expected}"


def test_missing_files_and_splits_of_plain_files(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: no such file or folder$"):
        read_queries(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"q\.tsv: a plain file has no splits, so there is no split 'test'$"):
        read_queries(write("q.tsv", "1\tx\n"), "test")


def test_queries_of_a_beir_folder_by_split(beir: Path) -> None:
    assert [query.id for query in read_queries(beir, "test")] == ["q40"]
    assert len(read_queries(beir)) == 42
    assert [query.text for query in read_queries(beir, "train-all")] == [f"query {n}" for n in range(40)]


def test_real_queries(shared: Path) -> None:
    data = shared / "data"
    assert len(read_queries(data / "scifact", "test")) == 300
    assert read_queries(data / "scifact" / "queries.jsonl")[0] == Query(
        "0", "0-dimensional biomaterials lack inductive properties."
    )
    assert len(read_queries(data / "xquad" / "xquad.en.json")) == 1190
