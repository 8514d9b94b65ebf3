"""Malformed lines: each is reported with file and line, and every row is in exactly one of vectors and rejected."""

from pathlib import Path

import pytest

from tests.encoding.helpers import run, write_corpus
from tests.encoding.malformed import MALFORMED, corpus_rows, faults, malformed_rows

ROWS, COUNT = 2_000, 200


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed")
    corpus = write_corpus(folder / "corpus.jsonl", list(corpus_rows(ROWS, malformed_rows(ROWS, COUNT))))
    assert run(corpus, folder / "vectors", shard_size=300) == (7, ROWS - COUNT, COUNT, 0)
    return folder / "vectors"


def test_every_row_is_in_one_place_and_every_bad_one_is_named(output: Path) -> None:
    malformed = malformed_rows(ROWS, COUNT)
    assert set(malformed.values()) == set(MALFORMED)
    assert faults(output, str(output.with_name("corpus.jsonl")), ROWS, malformed) == []


def test_what_is_wrong_would_be_found(output: Path) -> None:
    malformed, corpus = malformed_rows(ROWS, COUNT), str(output.with_name("corpus.jsonl"))
    row = next(iter(malformed))
    assert len(faults(output, "elsewhere", ROWS, malformed)) == COUNT
    less = {place: kind for place, kind in malformed.items() if place != row}
    assert len(faults(output, corpus, ROWS, less)) == 3
    other = next(kind for kind, (_, said) in MALFORMED.items() if said != MALFORMED[malformed[row]][1])
    assert faults(output, corpus, ROWS, malformed | {row: other})[0].startswith(f"row {row + 1}, {other}: reported as")
