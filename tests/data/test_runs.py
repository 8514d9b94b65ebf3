"""Runs read query by query: the same hits as when they are read whole, whatever the order of the lines."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.runs import Run
from llara.data.trec import read_run
from llara.errors import DataError

Write = Callable[[str, Any], Path]


def lines(queries: int = 7, depth: int = 5) -> list[str]:
    rng = random.Random(1)
    return [
        f"q{query} Q0 d{query * 3 + number} {number + 1} {rng.choice([1.5, -2.25, 0.125])} tag\n"
        for query in range(queries)
        for number in range(depth)
    ]


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
@pytest.mark.parametrize("order", ["as written", "shuffled"])
def test_the_hits_are_those_of_the_whole_file(write: Write, name: str, order: str) -> None:
    rows = lines()
    if order == "shuffled":
        random.Random(2).shuffle(rows)
    path = write(name, "".join(rows).removesuffix("\n"))
    expected = read_run(path)
    with Run(path) as run:
        assert dict(run) == expected
        assert run.queries == tuple(expected)
        for query_id in reversed(run.queries):  # in any order, and again
            assert run.hits(query_id) == expected[query_id]
        assert run.hits("elsewhere") == [] and "elsewhere" not in run and "q0" in run


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_a_run_without_hits(write: Write, name: str) -> None:
    with Run(write(name, "")) as run:
        assert run.queries == () and list(run) == []


def test_the_line_of_a_document(write: Write) -> None:
    with Run(write("run", "a Q0 x 1 2.0 t\nb Q0 x 1 1.0 t\na Q0 y 2 1.0 t\n")) as run:
        assert [run.line_of("a", "x"), run.line_of("a", "y"), run.line_of("b", "x"), run.line_of("b")] == [1, 3, 2, 2]
        assert run.line_of("b", "y") is None and run.line_of("c") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q Q0 d 1 0.5\n", ":1: 5 columns; a run has 6 (query Q0 document rank score tag)"),
        ("q Q0 d 1 0.5 t\n\n", ":2: blank line"),
        (
            "q Q0 d 1 0.5 t\nq Q0 e x 0.5 t\n",
            ":2: the rank 'x' is not a whole number (column 4; the score is column 5)",
        ),
        ("q Q0 d 1 nan t\n", ":1: the score 'nan' is not a finite float32 number"),
        ("q Q0 d 1 1 t\nq Q0 d 2 0.5 t\n", ":2: document 'd' stands twice under query 'q'"),
        ("q Q0 d 1 1 t\nr Q0 d 1 1 t\nq Q0 d 2 0.5 t\n", ":3: document 'd' stands twice under query 'q'"),
        (b"q Q0 \xff 1 1 t\n", ":1: not UTF-8 at offset 5"),
    ],
)
def test_bad_lines_are_found_when_it_is_opened(write: Write, text: str | bytes, expected: str) -> None:
    path = write("run.trec", text)
    with pytest.raises(DataError) as caught:
        Run(path)
    assert str(caught.value) == f"{path}{expected}"
    with pytest.raises(DataError) as whole:
        read_run(path)
    assert str(whole.value) == str(caught.value)


def test_a_run_that_changes_under_the_reader(write: Write) -> None:
    path = write("run.trec", "a Q0 x 1 2.0 t\nb Q0 y 1 1.0 t\n")
    with Run(path) as run:
        path.write_bytes(path.read_bytes().replace(b"b Q0", b"c Q0"))
        with pytest.raises(DataError, match=r"run\.trec:2: was changed while it was read"):
            run.hits("b")


def test_a_missing_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Run(tmp_path / "none")
