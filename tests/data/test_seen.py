"""The table of first places: on disk, bounded, and gone at the end."""

import sqlite3
from pathlib import Path

import pytest

from llara.data.seen import FirstSeen, Place
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
        assert (tmp_path / "work" / "seen.sqlite").exists()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "seen.sqlite").write_bytes(b"half a table")
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
