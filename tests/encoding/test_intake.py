"""The table of first places: on disk, bounded, and gone at the end."""

import sqlite3
from pathlib import Path

import pytest

from llara.data import Row
from llara.encoding.intake import FirstSeen, Place, digest_rows, sift_rows
from llara.errors import StorageError


def test_the_first_place_of_an_id_is_kept(tmp_path: Path) -> None:
    with FirstSeen(tmp_path / "work") as seen:
        assert seen.add_all([("a", Place("x.jsonl", 1)), ("b", Place("x.jsonl", 2)), ("a", Place("y.jsonl", 1))]) == [
            None,
            None,
            Place("x.jsonl", 1),
        ]
        assert seen.add_all([("b", Place("x.jsonl", 9)), ("c", Place("y.jsonl", 3))]) == [Place("x.jsonl", 2), None]
        assert seen.add_all([("c", Place("x.jsonl", 1))]) == [Place("y.jsonl", 3)]
        assert (tmp_path / "work" / "ids.sqlite").exists()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "ids.sqlite").write_bytes(b"half a table")
    with FirstSeen(tmp_path / "work") as seen:
        assert seen.add_all([("a", Place("x", 1))]) == [None]


def test_a_file_name_need_not_be_text(tmp_path: Path) -> None:
    name = b"caf\xe9.jsonl".decode("utf-8", "surrogateescape")
    with FirstSeen(tmp_path / "work") as seen:
        assert seen.add_all([("a", Place(name, 1)), ("a", Place("x", 1))]) == [None, Place(name, 1)]


def test_a_table_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with FirstSeen(tmp_path / "work") as seen, pytest.raises(StorageError, match=r"needs about .* free; make room"):
        seen._table.execute("PRAGMA max_page_count = 8")
        seen.add_all([(str(number), Place("x", number)) for number in range(5_000)])


def test_a_fault_of_ours_in_the_table_is_no_riddle(tmp_path: Path) -> None:
    with FirstSeen(tmp_path / "work") as seen:
        seen._table.execute("DROP TABLE seen")
        with pytest.raises(StorageError) as caught:
            seen.add_all([("a", Place("x", 1))])
    assert isinstance(caught.value.__cause__, sqlite3.Error)


def test_rows_are_parted_in_order(tmp_path: Path) -> None:
    data = [b'{"_id": "a", "text": "1"}', b"bad", b'{"_id": "a", "text": "2"}', b'{"_id": "b", "text": "3"}']
    rows = [Row("c.jsonl", line, content, "json") for line, content in enumerate(data, 1)]
    with FirstSeen(tmp_path / "work") as seen:
        documents, rejected = sift_rows(rows, 100, seen)
    assert [document.text for document in documents] == ["1", "3"]
    assert [(entry["row"], entry["line"]) for entry in rejected] == [(102, 2), (103, 3)]
    assert rejected[1]["reason"] == "duplicate id (first at c.jsonl:1)"


def test_the_digest_of_rows_sees_content_and_borders_but_not_places() -> None:
    rows = [Row("a", 1, b"xy", "json"), Row("a", 2, b"z", "json")]
    moved = [Row("b", 7, b"xy", "json"), Row("b", 8, b"z", "json")]
    other_borders = [Row("a", 1, b"x", "json"), Row("a", 2, b"yz", "json")]
    assert digest_rows(rows) == digest_rows(moved)
    assert len({digest_rows(rows), digest_rows(other_borders), digest_rows(rows[:1]), digest_rows(rows[::-1])}) == 4
