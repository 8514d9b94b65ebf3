"""Rows are parted into documents and rejected ones, and their digest tells what was read."""

from pathlib import Path

from llara.data import Row
from llara.data.seen import FirstSeen
from llara.encoding.intake import digest_rows, sift_rows


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
