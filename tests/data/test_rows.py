"""Which rows there are in a file of each format, and what is wrong with a file that has none."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from llara.data import rows as rows_module
from llara.data.documents import parse_document, read_documents
from llara.data.lines import walk_files
from llara.data.rows import as_id, read_rows
from llara.errors import DataError
from llara.records import Document

Write = Callable[[str, Any], Path]


def failure(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows([path]))
    return str(caught.value)


def documents(path: Path) -> list[Document]:
    return list(read_documents([path]))


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.json", "c.ndjson", "c"])
def test_json_lines_under_any_of_their_names(write: Write, name: str) -> None:
    path = write(name, [{"_id": "a", "title": "T", "text": "one", "year": 3}, {"id": 7, "text": "two"}])
    assert documents(path) == [Document("a", "one", "T", {"year": 3}), Document("7", "two", "", {})]
    assert [(row.path, row.line, row.kind) for row in read_rows([path])] == [
        (str(path), 1, "json"),
        (str(path), 2, "json"),
    ]


def test_gzip_is_told_by_its_bytes_not_its_name(write: Write) -> None:
    packed = write("c.jsonl", gzip.compress(b'{"_id": "a", "text": "one"}\n'))
    plain = write("d.jsonl", '{"_id": "b", "text": "two"}')
    plain = plain.rename(plain.with_name("d.jsonl.gz"))
    assert [row.data for row in read_rows([packed, plain])] == [
        b'{"_id": "a", "text": "one"}',
        b'{"_id": "b", "text": "two"}',
    ]


def test_data_is_the_line_without_its_end_and_byte_order_mark(write: Write) -> None:
    path = write("c.jsonl", b'\xef\xbb\xbf{"_id": "a", "text": "x"}\r\n\n{"_id": 2, "text": "y"}')
    assert [(row.line, row.data) for row in read_rows([path])] == [
        (1, b'{"_id": "a", "text": "x"}'),
        (2, b""),
        (3, b'{"_id": 2, "text": "y"}'),
    ]


def test_tsv_columns_are_counted_per_line(write: Write) -> None:
    path = write("c.tsv", "1\tpassage\n2\ttitle\tpassage two\nD3\thttp://x\ttitle three\tbody\n")
    assert documents(path) == [
        Document("1", "passage", "", {}),
        Document("2", "passage two", "title", {}),
        Document("D3", "body", "title three", {"url": "http://x"}),
    ]


def test_plain_text_is_cut_at_blank_lines(write: Write) -> None:
    path = write("my notes.txt", "\n\nfirst\nstill first\n \t\n\nsecond\r\n")
    rows = list(read_rows([path]))
    assert [row.line for row in rows] == [3, 7]
    assert [parse_document(row) for row in rows] == [
        Document("my%20notes-1", "first\nstill first"),
        Document("my%20notes-2", "second"),
    ]


def test_a_folder_of_text_files_is_one_document_each_sorted(write: Write, tmp_path: Path) -> None:
    write("docs/b.txt", "\n\nsecond\n\nstill second\n")
    write("docs/a/z 1.txt", "first")
    write("docs/empty.txt", "")
    write("docs/.hidden/x.txt", "not read")
    write("docs/readme.md", "not read")
    rows = list(read_rows([tmp_path / "docs"]))
    assert [Path(row.path).name for row in rows] == ["z 1.txt", "b.txt", "empty.txt"]
    assert parse_document(rows[0]) == Document("a/z%201.txt", "first")
    assert parse_document(rows[1]) == Document("b.txt", "\n\nsecond\n\nstill second\n")
    with pytest.raises(DataError, match=r"empty\.txt:1: empty passage$"):
        parse_document(rows[2])


def test_files_are_walked_in_the_order_of_their_relative_paths(write: Write, tmp_path: Path) -> None:
    names = ["a/z", "a.b/x", "a-b", "a0", "b/c/d", "b/c.d", "b/C/e", "é", "B"]
    for name in names:
        write(f"docs/{name}.txt", "x")
    (tmp_path / "docs" / "link").symlink_to(tmp_path / "docs" / "b")  # would be read twice, or for ever
    found = [path.relative_to(tmp_path / "docs").as_posix() for path in walk_files(tmp_path / "docs")]
    assert found == sorted(f"{name}.txt" for name in names)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        list(walk_files(tmp_path))


def test_row_data_covers_an_id_that_comes_from_a_name(write: Write, tmp_path: Path) -> None:
    before = [row.data for row in read_rows([write("x/a.txt", "same"), write("x/b.txt", "same")])]
    assert before[0] != before[1]
    assert next(read_rows([tmp_path / "x"])).data == b"a.txt\nsame"


def ids(*paths: Path) -> list[str]:
    return [parse_document(row).id for row in read_rows(paths)]


def test_text_files_of_one_name_are_told_apart_by_their_folders(write: Write) -> None:
    a, b, other = write("my a/notes.txt", "1\n\n2"), write("b/notes.txt.gz", "3"), write("b/more.txt", "4")
    assert ids(a, b, other) == ["my%20a/notes-1", "my%20a/notes-2", "b/notes-1", "more-1"]
    assert ids(a, other) == ["notes-1", "notes-2", "more-1"]
    deep = [write("x/a/notes.txt", "1"), write("y/a/notes.txt", "2")]
    assert ids(*deep) == ["x/a/notes-1", "y/a/notes-1"]
    alike = write("b/notes.md", "5")
    assert ids(b, alike) == [as_id(f"{path.as_posix()}") + "-1" for path in (b, alike)]
    assert ids(a, a)[0] == "notes-1"  # the same file twice is a mistake, which the repeated ids show


def test_text_files_without_a_folder_in_their_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write("notes.txt", "1").parent)
    write("b/notes.txt", "2")
    assert ids(Path("notes.txt"), Path("b/notes.txt")) == ["notes-1", "b/notes-1"]


def test_text_folders_that_share_a_name_are_told_apart(write: Write) -> None:
    folders = [write(f"{name}/notes.txt", name).parent for name in ("a", "b")]
    third = write("c/else.txt", "c").parent
    write("b/sub/x.txt", "x")
    assert ids(*folders, third) == ["a/notes.txt", "b/notes.txt", "b/sub/x.txt", "else.txt"]


def test_as_id_leaves_no_white_space() -> None:
    assert as_id("plain/Name_1.txt") == "plain/Name_1.txt"
    assert as_id("a b\tc%d\xa0é\udcff") == "a%20b%09c%25d%C2%A0é%FF"


def test_squad_paragraphs_are_documents_and_equal_ones_are_one(write: Write, squad: Callable[..., str]) -> None:
    text = squad(
        ("Super_Bowl", [("one", [("1", "q1")]), ("two", []), ("one", [("2", "q2")])]), ("Oxygen", [("three", [])])
    )
    assert documents(write("s.json", text)) == [
        Document("Super_Bowl-1", "one", "Super Bowl"),
        Document("Super_Bowl-2", "two", "Super Bowl"),
        Document("Oxygen-1", "three", "Oxygen"),
    ]
    assert len(documents(write("one-line.json", json.dumps(json.loads(text))))) == 3


def test_a_beir_folder_is_read_through_its_corpus(beir: Path) -> None:
    first = next(read_rows([beir]))
    assert (first.path, first.line) == (str(beir / "corpus.jsonl"), 1)
    assert len(documents(beir)) == 41


def test_files_without_rows_say_why(write: Write, tmp_path: Path) -> None:
    assert failure(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'}: no such file"
    for name in ("e.jsonl", "e.jsonl.gz", "e.tsv", "e.txt", "e.json", "e"):
        assert failure(write(name, "")) == f"{tmp_path / name}: the file is empty"
    assert failure(write("w.txt", " \n\n")) == f"{tmp_path / 'w.txt'}: the file holds white space only"
    (tmp_path / "folder").mkdir()
    assert failure(tmp_path / "folder") == (
        f"{tmp_path / 'folder'}: the folder holds no corpus: "
        "neither corpus.jsonl (or .jsonl.gz) nor a .txt or .parquet file"
    )


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    for name in ("c.jsonl", "c.txt", "c"):
        os.mkfifo(tmp_path / name)
        assert failure(tmp_path / name) == (
            f"{tmp_path / name}: is no regular file but a pipe or a device; save it to a file first"
        )


def test_unknown_formats_name_the_known_ones(write: Write) -> None:
    path = write("x.bin", b"\x89PNG\r\n\x1a\n")
    assert failure(path) == (
        f"{path}: unknown format; known are: JSON lines (.jsonl, .json), tab-separated (.tsv), plain text (.txt, .md), "
        "each also as .gz, parquet (.parquet), SQuAD JSON (.json), a folder of .txt or of .parquet files, "
        "or a BEIR folder (corpus.jsonl)"
    )


def test_json_that_is_no_corpus_says_what_is_missing(write: Write) -> None:
    path = write("x.json", '[\n{"_id": "a"}\n]')
    assert failure(path) == f"{path}: neither JSON lines nor SQuAD JSON: no list in the field data"
    path = write("y.json", "{\n oops")
    assert failure(path).startswith(f"{path}: neither JSON lines nor SQuAD JSON: Expecting property name")
    path = write("z.json", '{"data": [{"title": "T"}]}')
    assert failure(path) == f"{path}: data[0]: no list in the field paragraphs"
    path = write("v.json", '{"data": [{"title": "T", "paragraphs": [{"qas": []}]}]}')
    assert failure(path) == f"{path}: data[0].paragraphs[0]: the field context is missing or not text"
    path = write("u.json", '{"data": []}')
    assert failure(path) == f"{path}: the SQuAD JSON holds no paragraph"


def test_a_cut_gzip_file_gives_its_whole_lines_then_the_line_reached(write: Write) -> None:
    lines = [f'{{"_id": {n}, "text": "{n * n * 7919 % 104729}"}}' for n in range(5000)]
    path = write("c.jsonl.gz", "\n".join(lines))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    got = []
    reader = read_rows([path])
    with pytest.raises(DataError) as caught:
        while True:
            got.append(next(reader).data.decode())
    count = len(got)
    assert 1000 < count < 5000
    assert got == lines[:count]
    assert str(caught.value).startswith(f"{path}:{count + 1}: the gzip file is cut or damaged here (")


def test_a_damaged_gzip_file_is_an_error(write: Write) -> None:
    path = write("c.jsonl.gz", [{"_id": n, "text": "x"} for n in range(2000)])
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # the checksum at the end
    path.write_bytes(data)
    assert "the gzip file is cut or damaged here (CRC check failed" in failure(path)
    folder = write("t/a.txt.gz", b"text").parent
    (folder / "b.txt").write_bytes(gzip.compress(b"text" * 100)[:-9])
    assert failure(folder).startswith(f"{folder / 'b.txt'}: the gzip file is cut or damaged (")


def test_a_line_of_a_megabyte_is_an_ordinary_row(write: Write) -> None:
    text = "word " * 200_000
    assert documents(write("c.jsonl.gz", [{"_id": "big", "text": text}]))[0].text == text


def test_a_line_too_long_is_one_bad_row_and_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"_id": "a", "text": "x"}\n')
        for _ in range(300):
            file.write(b"y" * 2**20)
        file.write(b'\n{"_id": "b", "text": "z"}\n')
    tracemalloc.start()
    rows = list(read_rows([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row.line, row.kind) for row in rows] == [(1, "json"), (2, "oversize"), (3, "json")]
    assert peak < 200 * 2**20
    with pytest.raises(DataError) as caught:
        parse_document(rows[1])
    assert str(caught.value) == f"{path}:2: the row has 314,572,801 bytes; at most 67,108,864 are read"


def test_too_long_is_the_same_in_every_format(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    long = "x" * 60
    text = write("a.txt", f"ok\n\n{long}\n{long}\n{long}\n\n{'y' * 300}\nz\n\nok\n")
    assert [(row.line, row.kind) for row in read_rows([text])] == [
        (1, "text"),
        (3, "oversize"),
        (7, "oversize"),
        (10, "text"),
    ]
    tsv = write("a.tsv", f"1\tok\n2\t{'y' * 300}\n3\tok")
    assert [(row.line, row.kind) for row in read_rows([tsv])] == [(1, "tsv"), (2, "oversize"), (3, "tsv")]
    folder = write("f/a.txt", "y" * 101).parent
    assert [row.kind for row in read_rows([folder])] == ["oversize"]
    exact = write("b.tsv", f"1\t{'y' * 98}\n2\tz")
    assert [row.kind for row in read_rows([exact])] == ["tsv", "tsv"]


def test_a_changed_oversize_row_has_other_data(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 100)
    seen = {next(read_rows([write("a.tsv", "y" * 299 + last)])).data for last in "abc"}
    assert len(seen) == 3


def test_several_corpora_follow_each_other(write: Write) -> None:
    paths = [write("a.tsv", "1\tx\n"), write("b.jsonl", [{"_id": "2", "text": "y"}])]
    assert [document.id for document in read_documents(paths)] == ["1", "2"]


def test_real_corpora(shared: Path) -> None:
    data = shared / "data"
    scifact = documents(data / "scifact")
    assert (len(scifact), scifact[0].id) == (5183, "4983")
    assert scifact[0].title.startswith("Microstructural development of human newborn")
    chinese = documents(data / "xquad" / "xquad.zh.json")
    assert (len(chinese), chinese[0].id, chinese[0].title) == (240, "Super_Bowl_50-1", "Super Bowl 50")
    assert "黑豹" in chinese[0].text
    pairs = documents(data / "medquad" / "pairs.jsonl.gz")
    assert len(pairs) == len({document.id for document in pairs}) == 16407
    assert pairs[0].title == ""
    assert pairs[0].metadata == {"source": "CancerGov", "focus": "Adult Acute Lymphoblastic Leukemia"}
    assert pairs[0].text.startswith("Key Points - Adult acute lymphoblastic leukemia")
