"""Lines on disk that are read by number, and the table of ids beside them."""

import hashlib
import threading
from pathlib import Path

import pytest

from llara.data import seekable
from llara.data.seekable import LineReader, LineWriter, Numbers
from llara.errors import StorageError

VALUES = [["a", 1], "ü \u2028 \n \x00", None, {"x": [1.5, -2]}, "", 10**30]


def written(folder: Path, values: list[object] = VALUES) -> LineReader:
    with LineWriter(folder, "values") as writer:
        assert [writer.add(value) for value in values] == list(range(len(values)))
        records = writer.close()
    assert sorted(records) == ["values.jsonl", "values.starts"]
    for name, record in records.items():
        data = (folder / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    return LineReader(folder, "values")


@pytest.mark.parametrize("buffered", [1, 2, 2**16])
def test_values_come_back_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered: int) -> None:
    monkeypatch.setattr(seekable, "_BUFFERED", buffered)
    reader = written(tmp_path)
    assert len(reader) == len(VALUES)
    assert [reader[number] for number in reversed(range(len(VALUES)))] == VALUES[::-1]
    for number in (-1, len(VALUES)):
        with pytest.raises(IndexError, match="there is no value"):
            reader[number]


def test_nothing_can_be_written_and_read(tmp_path: Path) -> None:
    assert len(written(tmp_path, [])) == 0


def test_several_threads_read_at_once(tmp_path: Path) -> None:
    reader = written(tmp_path, list(range(500)))
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(number for number in range(500) if reader[number] != number)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_line_that_is_no_json_is_damage(tmp_path: Path) -> None:
    written(tmp_path)
    data = (tmp_path / "values.jsonl").read_bytes()
    (tmp_path / "values.jsonl").write_bytes(b"x" + data[1:])
    with pytest.raises(StorageError, match="value 0 is no JSON"):
        LineReader(tmp_path, "values")[0]


def test_a_failed_block_closes_its_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), LineWriter(tmp_path, "values") as writer:
        writer.add(1)
        raise ZeroDivisionError


def test_a_full_disk_is_a_storage_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(StorageError, match="make room"), LineWriter(Path("/dev"), "values") as writer:
        for file in writer._files:
            file.close()
        writer._files = [full.open("wb"), full.open("wb")]
        writer.add("x" * 10**6)


def test_ids_have_the_number_they_were_entered_with(tmp_path: Path) -> None:
    with Numbers(tmp_path / "ids") as table:
        assert [table.add(name, number) for number, name in enumerate(["a", "b", "a", "ü"])] == [
            True,
            True,
            False,
            True,
        ]
        assert [table.find(name) for name in ("a", "b", "ü", "c")] == [0, 1, 3, None]
    assert list(tmp_path.iterdir()) == []


def test_a_left_over_table_is_not_taken_up(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"rubbish")
    with Numbers(tmp_path / "ids") as table:
        assert table.find("a") is None
