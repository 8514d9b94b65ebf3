"""Which documents fit a filter, told from a document store; what a field that is not there says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.conditions import parse_conditions
from llara.data import read_rows
from llara.encoding.documents import DocumentStore
from llara.encoding.shards import write_documents
from llara.errors import ConfigError, StorageError
from llara.index import filters
from llara.index.base import Allowed, StoredIds, write_ids
from llara.index.filters import find_allowed
from llara.index.parts import live_documents

LANGS = ("de", "en", "fr")
ROWS = [
    {"_id": f"d{n}", "text": f"text {n}", "year": 1990 + n, "lang": LANGS[n % 3], "tags": [n % 2, f"t{n % 5}"]}
    for n in range(45)
]
for row in ROWS[40:]:
    row["year"] = str(row["year"])  # some years are written as texts
    row["late"] = True


@pytest.fixture
def store(tmp_path: Path) -> DocumentStore:
    return make_store(tmp_path / "documents", ROWS)


def make_store(folder: Path, rows: list[dict[str, Any]]) -> DocumentStore:
    corpus = folder.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_documents(folder, read_rows([corpus]), shard_size=10)
    return DocumentStore.open(folder)


def ids_of(folder: Path, names: list[str]) -> StoredIds:
    folder.mkdir(exist_ok=True)
    write_ids(folder, names)
    return StoredIds(folder, len(names))


def fitting(store: DocumentStore, ids: StoredIds, *conditions: str, live: Allowed | None = None) -> list[int]:
    allowed, notes = find_allowed(parse_conditions(conditions), store, ids, live)
    for each in notes:
        print(each)
    assert (allowed.total, allowed.count) == (len(ids), int(allowed.mask(0, len(ids)).sum()))
    return np.flatnonzero(allowed.mask(0, len(ids))).tolist()


@pytest.fixture
def ids(tmp_path: Path) -> StoredIds:
    return ids_of(tmp_path / "ids", [str(row["_id"]) for row in ROWS])


@pytest.mark.parametrize("block", [8, 16, 1 << 16])
def test_documents_that_fit_all_conditions(
    store: DocumentStore, ids: StoredIds, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "BLOCK", block)
    assert fitting(store, ids, "year>=2000", "lang=en") == [n for n in range(10, 40) if n % 3 == 1]
    assert fitting(store, ids, "lang in en,de") == [n for n in range(45) if n % 3 < 2]
    assert fitting(store, ids, "tags=1", "tags=t3") == [n for n in range(45) if n % 10 == 3]
    assert fitting(store, ids, "late=true") == [40, 41, 42, 43, 44]
    assert fitting(store, ids, "lang=nowhere") == []


def test_values_of_another_type_are_passed_over_and_counted(
    store: DocumentStore, ids: StoredIds, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fitting(store, ids, 'year>="2031"') == [41, 42, 43, 44]
    said = "--filter 'year>=\"2031\"': 40 documents hold a number there, which fits no condition on text"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("block", [8, 1 << 16])
def test_deleted_documents_fit_nothing_and_count_nowhere(
    store: DocumentStore,
    ids: StoredIds,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(filters, "BLOCK", block)
    live = live_documents(np.array([1, 9, 20, 41]), 45)
    assert fitting(store, ids, 'year>="2031"', live=live) == [42, 43, 44]
    assert "37 documents hold a number there" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no document has a field 'late'"):
        fitting(store, ids, "late=true", live=live_documents(np.arange(40, 45), 45))


def test_a_field_that_no_document_has(store: DocumentStore, ids: StoredIds) -> None:
    with pytest.raises(ConfigError) as caught:
        fitting(store, ids, "yaer=2000", "lang=en", "late=3")
    first, second = caught.value.problems
    assert first == (
        "--filter: 'yaer=2000': no document has a field 'yaer' (did you mean 'year'?); there are lang, late, tags, year"
    )
    assert second == "--filter: 'late=3': compares with a number, and 'late' holds true or false in every document"


def test_numbers_that_are_written_as_texts(tmp_path: Path) -> None:
    store = make_store(tmp_path / "documents", [{"_id": "a", "text": "x", "year": "2020"}])
    with pytest.raises(ConfigError, match="holds text in every document; between double quotes a value is a text"):
        fitting(store, ids_of(tmp_path / "ids", ["a"]), "year=2020")
    assert fitting(store, ids_of(tmp_path / "ids", ["a"]), 'year="2020"') == [0]


def test_documents_without_metadata(tmp_path: Path) -> None:
    store = make_store(tmp_path / "documents", [{"_id": "a", "text": "x"}])
    with pytest.raises(ConfigError, match="no document has a field 'x'; the documents have no metadata at all"):
        fitting(store, ids_of(tmp_path / "ids", ["a"]), "x=1")


def test_a_store_that_has_grown_serves_and_another_one_does_not(store: DocumentStore, tmp_path: Path) -> None:
    names = [str(row["_id"]) for row in ROWS]
    assert fitting(store, ids_of(tmp_path / "fewer", names[:21]), "lang=fr") == list(range(2, 21, 3))
    with pytest.raises(StorageError, match=r"45 documents there, 46 in the index.*build it anew from this folder"):
        fitting(store, ids_of(tmp_path / "more", [*names, "d45"]), "lang=fr")
    with pytest.raises(StorageError, match="document 0 is 'd0' there, 'd1' in the index"):
        fitting(store, ids_of(tmp_path / "other", [names[1], names[0]]), "lang=fr")


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 100])
def test_bits_say_what_the_mask_said(total: int) -> None:
    mask = np.random.default_rng(total).random(total) < 0.4
    allowed = Allowed.of(mask)
    assert (allowed.total, allowed.count) == (total, mask.sum())
    assert allowed.holds(np.arange(total)).tolist() == mask.tolist()
    for start in range(0, total, 3):
        for stop in range(start, total + 1, 5):
            assert allowed.mask(start, stop).tolist() == mask[start:stop].tolist()
