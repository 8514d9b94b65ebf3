"""Judged queries, from files and from collections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.judged import read_judged
from llara.errors import ConfigError, DataError

Write = Callable[[str, Any], Path]


def test_plain_files(write: Write) -> None:
    queries = write("queries.tsv", "q1\tone\nq2\ttwo\nq3\tthree\n")
    qrels = write("qrels.tsv", "q2 0 d3 1\nq2 0 d1 2\nq2 0 d5 0\nq9 0 d1 1\nq1 0 d4 1\n")
    judged = read_judged(queries, qrels, "train")
    assert [(query.id, query.text) for query in judged.queries] == [("q1", "one"), ("q2", "two")]
    assert judged.relevant == {"q1": ("d4",), "q2": ("d3", "d1")}
    assert (judged.without, judged.path) == (1, qrels)
    assert str(judged.unknown(["d5", "d1"])) == f"{qrels}:2: the corpus has no document with the id 'd1'"


def test_a_collection_brings_its_judgements(beir: Path, write: Write) -> None:
    judged = read_judged(beir, None, "train-all")
    assert len(judged.queries) == 40 and judged.relevant["q7"] == ("d7",) and judged.without == 0
    assert judged.unknown(["d7"]).line == 9
    assert str(judged.path).endswith("qrels/train.tsv")
    given = read_judged(beir, write("own", "q1 0 d9 1\n"), "train")
    assert [query.id for query in given.queries] == ["q1"] and given.without == 41


def test_pairs_are_judged_without_lines(write: Write) -> None:
    rows = [{"_id": str(n), "question": f"what is {n}", "answer": f"it is {n}", "focus": f"f{n}"} for n in range(30)]
    judged = read_judged(write("pairs.jsonl", rows), None, "train")
    assert len(judged.queries) > 10
    first = judged.relevant[judged.queries[0].id]
    assert len(first) == 1 and judged.unknown(first).line is None


def test_what_is_missing_is_named(write: Write, beir: Path) -> None:
    queries = write("queries.tsv", "q1\tone\n")
    with pytest.raises(ConfigError, match=r"--qrels: is required, .*queries\.tsv holds queries alone"):
        read_judged(queries, None, "train")
    with pytest.raises(DataError, match=r"other: no query has a relevant document"):
        read_judged(queries, write("other", "q1 0 d1 0\nq2 0 d1 1\n"), "train")
    write("set/qrels/odd.tsv", "query-id\tcorpus-id\tscore\nnobody\td1\t1\n")
    with pytest.raises(DataError, match=r"odd\.tsv:2: no query has the id 'nobody'"):
        read_judged(beir, None, "odd")
