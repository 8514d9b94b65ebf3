"""Answers of filters that are kept in the index folder: found again, never taken for another's, never an error."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.conditions import parse_conditions
from llara.config import IndexConfig, VerifyConfig
from llara.encoding.documents import DocumentStore
from llara.errors import ConfigError
from llara.files import FolderLock
from llara.index import remembered
from llara.index.job import index
from llara.index.opening import open_index
from llara.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of words over 20 documents; three years are written as texts."""
    rows: list[dict[str, Any]] = [{"_id": f"d{n}", "text": f"word{n}", "year": 2000 + n} for n in range(20)]
    for row in rows[17:]:
        row["year"] = str(row["year"])
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index(IndexConfig(corpus=(tmp_path / "corpus.jsonl",), output=tmp_path / "index", type="bm25"))
    return tmp_path / "index"


def fitting(folder: Path, *conditions: str) -> list[int]:
    opened = open_index(folder)
    store = DocumentStore.open(folder / opened.manifest.documents)
    found = remembered.allowed_documents(parse_conditions(conditions), folder, opened.manifest, store, opened.ids)
    return np.flatnonzero(found.mask(0, len(opened))).tolist()


def kept(folder: Path) -> list[Path]:
    return sorted((folder / remembered.FOLDER).iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that the documents are read."""
    times: list[int] = []
    plain = DocumentStore.iter_documents

    def counted(self: DocumentStore) -> Any:
        times.append(1)
        return plain(self)

    monkeypatch.setattr(DocumentStore, "iter_documents", counted)
    return times


def test_documents_are_read_once(folder: Path, reads: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        assert fitting(folder, "year>=2010") == list(range(10, 17))
        assert "3 documents hold text there" in capsys.readouterr().err, "what was passed over is said every time"
    assert len(reads) == 1 and len(kept(folder)) == 1
    assert fitting(folder, "year>=2011") == list(range(11, 17))
    assert fitting(folder, "year>=2010", "year<2012") == [10, 11]
    assert len(reads) == 3
    with pytest.raises(ConfigError, match="no document has a field 'yaer'"):
        fitting(folder, "yaer>=2010")
    assert len(kept(folder)) == 3, "an error is no answer"


def test_an_index_that_was_changed_is_asked_anew(folder: Path, reads: list[int]) -> None:
    assert fitting(folder, "year>=2015") == [15, 16]
    (folder / "ids").write_text("d15\n")
    index(IndexConfig(output=folder, delete=folder / "ids"))
    assert fitting(folder, "year>=2015") == [16]
    assert len(reads) >= 2


def test_damage_means_to_read_again(folder: Path, reads: list[int]) -> None:
    assert fitting(folder, "year>=2010") == list(range(10, 17))
    (path,) = kept(folder)
    good = path.read_bytes()
    for bad in (b"", good[:-1], good[:40], bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 4])):
        path.write_bytes(bad)
        before = len(reads)
        assert fitting(folder, "year>=2010") == list(range(10, 17))
        assert len(reads) == before + 1 and path.read_bytes() == good


def test_few_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "KEPT", 3)
    (folder / remembered.FOLDER).mkdir()
    left = folder / remembered.FOLDER / ".tmp-1-left"
    left.write_text("of a process that was killed")
    os.utime(left, (1, 1))
    for year in range(2005, 2010):
        fitting(folder, f"year>={year}")
    assert len(kept(folder)) == 3 and not left.exists()


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path, reads: list[int]) -> None:
    (folder / remembered.FOLDER).write_text("a file where the folder would be")
    for _ in range(2):
        assert fitting(folder, "year>=2010") == list(range(10, 17))
    assert len(reads) == 2


def test_they_are_no_part_of_the_index(folder: Path, tmp_path: Path) -> None:
    fitting(folder, "year>=2010")
    kept(folder)[0].write_bytes(b"damaged")
    assert verify(VerifyConfig(path=folder)).documents == 20
    assert index(IndexConfig(corpus=(tmp_path / "corpus.jsonl",), output=folder, type="bm25")).reused
    with FolderLock(folder):  # a search does not wait for a writer, and keeps its answer all the same
        assert fitting(folder, "year>=2010") == list(range(10, 17))
