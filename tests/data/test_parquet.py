"""Parquet files give the same documents as JSON lines do, in bounded memory, and say what is wrong with them."""

import datetime
import decimal
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from llara.data.documents import parse_document, read_documents
from llara.data.parquet import parquet_rows
from llara.data.rows import read_rows
from llara.errors import DataError, MissingExtra
from llara.records import Document

Write = Callable[[str, Any], Path]


def save(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, **options)
    return path


def documents(path: Path) -> list[Document]:
    return [parse_document(row) for row in read_rows([path])]


def test_the_same_rows_give_the_same_documents_as_json_lines(write: Write, tmp_path: Path) -> None:
    rows = [
        {"_id": "a", "title": "T", "text": "하늘은 파랗다.", "year": 3, "tags": ["x", "y"]},
        {"_id": "b", "title": "", "text": "天空是蓝色的。", "year": None, "tags": []},
    ]
    lines = write("c.jsonl", rows)
    path = save(tmp_path / "c.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    assert documents(path) == documents(lines)
    assert [(row.path, row.line) for row in read_rows([path])] == [(str(path), 1), (str(path), 2)]


def test_ids_may_be_numbers_and_text_may_be_stored_in_any_way(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        text = pa.array(["één", "two"]).cast(kind)
        path = save(tmp_path / "c.parquet", {"id": [7, 8], "text": text})
        assert documents(path) == [Document("7", "één"), Document("8", "two")]


def test_a_labelled_pair_is_read_as_one(tmp_path: Path) -> None:
    path = save(tmp_path / "c.parquet", {"_id": ["1"], "question": ["why"], "answer": ["because"], "focus": ["x"]})
    (document,) = documents(path)
    assert (document.text, document.metadata) == ("because", {"focus": "x"})


def test_values_of_other_kinds_become_json_or_are_left_out(tmp_path: Path) -> None:
    columns = {
        "_id": ["a"],
        "text": ["x"],
        "score": [float("nan")],
        "scores": [[1.0, float("inf")]],
        "day": [datetime.date(2020, 2, 1)],
        "moment": pa.array([1], pa.timestamp("ns")),
        "price": [decimal.Decimal("1.50")],
        "picture": [{"bytes": b"\xff\x00", "path": "p"}],
        "thumbnail": [b"\xff\x00"],
    }
    (document,) = documents(save(tmp_path / "c.parquet", columns))
    assert document.metadata == {
        "score": None,
        "scores": [1.0, None],
        "day": "2020-02-01",
        "moment": "1970-01-01 00:00:00.000000001",
        "price": "1.50",
    }


def test_a_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    texts = pa.array(["good", None, "x", "bad: \u00e9"]).cast(pa.binary()).to_pylist()
    texts[3] = texts[3][:-1]
    path = save(tmp_path / "c.parquet", {"_id": ["1", "2", "3 4", "5"], "text": texts})
    reasons = []
    for row in read_rows([path]):
        try:
            parse_document(row)
        except DataError as error:
            reasons.append(str(error))
    assert [reason.removeprefix(str(path)) for reason in reasons] == [
        ":2: no text",
        ":3: the document id '3 4' holds white space or a control character",
        ":4: not UTF-8: byte 0xc3 at offset 27",
    ]


def test_a_row_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara.data.rows.MAX_LINE_BYTES", 50)
    path = save(tmp_path / "c.parquet", {"_id": ["1", "2"], "text": ["x", "y" * 60]})
    good, bad = read_rows([path])
    assert parse_document(good).text == "x"
    with pytest.raises(DataError, match=r"c\.parquet:2: the row has 84 bytes"):
        parse_document(bad)


def test_a_folder_of_parquet_files_is_one_corpus(tmp_path: Path) -> None:
    for number in (1, 0):
        save(tmp_path / "set" / "data" / f"part-{number}.parquet", {"_id": [f"d{number}"], "text": ["x"]})
    (tmp_path / "set" / "README.md").write_text("no part of it")
    assert [document.id for document in read_documents([tmp_path / "set"])] == ["d0", "d1"]


def test_what_is_no_parquet_file_is_named(write: Write, tmp_path: Path) -> None:
    good = save(tmp_path / "good.parquet", {"_id": [str(i) for i in range(2000)], "text": ["text " * 9] * 2000})
    raw = good.read_bytes()
    cases = {
        "text": b'{"_id": "a", "text": "x"}\n',
        "cut": raw[: len(raw) // 2],
        "empty": b"",
        "head": b"PAR1" + raw[-40:],
        "footer": raw[:-60] + bytes(40) + raw[-20:],
    }
    for name, content in cases.items():
        path = write(f"{name}.parquet", content)
        with pytest.raises(DataError) as caught:
            list(parquet_rows(path))
        assert str(caught.value).startswith(f"{path}: is no parquet file, or is damaged")
    with pytest.raises(DataError, match="no such file"):
        list(read_rows([tmp_path / "missing.parquet"]))
    with pytest.raises(DataError, match="the parquet file holds no row"):
        list(read_rows([save(tmp_path / "none.parquet", {"_id": pa.array([], pa.string())})]))


def test_damage_inside_is_found_where_the_writer_left_checksums(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(50).hex() for _ in range(3000)]
    columns = {"_id": [str(i) for i in range(3000)], "text": texts}
    path = save(
        tmp_path / "c.parquet",
        columns,
        write_page_checksum=True,
        row_group_size=1000,
        use_dictionary=False,
        compression="none",
    )
    raw = bytearray(path.read_bytes())
    raw[raw.index(texts[2500].encode()[:8])] ^= 1
    path.write_bytes(raw)
    read: list[bytes] = []
    with pytest.raises(DataError, match=r"c\.parquet: is no parquet file, or is damaged after row"):
        read.extend(parquet_rows(path))
    assert 1800 < len(read) <= 2500  # the good row groups, but for what shares a batch with the bad one


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rng = random.Random(0)

    def peak(count: int) -> int:
        texts = [rng.randbytes(500).hex() for _ in range(count)]
        columns = {"_id": [str(i) for i in range(count)], "text": texts}
        path = save(tmp_path / f"{count}.parquet", columns, row_group_size=count)
        del columns, texts
        before, most = pa.total_allocated_bytes(), 0
        for _ in parquet_rows(path):
            most = max(most, pa.total_allocated_bytes() - before)
        return most

    assert peak(20_000) < peak(4_000) + 2**20


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "c.parquet", {"_id": ["1"], "text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"c\.parquet: reading parquet needs .*pip install 'llara\[data\]'"):
        list(read_rows([path]))


def test_each_row_is_valid_json(tmp_path: Path) -> None:
    path = save(tmp_path / "c.parquet", {"_id": ["1"], "text": ['a "quote", a \\ and a\nline\u2028']})
    assert [json.loads(row) for row in parquet_rows(path)] == [
        {"_id": "1", "text": 'a "quote", a \\ and a\nline\u2028'}
    ]
