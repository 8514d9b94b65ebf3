"""Judgements and runs: formats, order of ties, scores in full, and every bad line."""

import gzip
import itertools
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.data.collections import read_qrels
from llara.data.trec import rank_hits, read_qrel_lines, read_run, write_run
from llara.errors import DataError
from llara.records import Hit, Qrel

Write = Callable[[str, Any], Path]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.txt", "q1 0 d1 1\nq1 0 d2 0\nq2 0 d1 -1\n"),
        ("q.tsv", "q1\t0\td1\t1\nq1\t0\td2\t0\nq2\t0\td1\t-1"),
        ("q.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td1\t-1\n"),
        ("q.tsv.gz", "q1 d1 1\nq1 d2 0\nq2 d1 -1\n"),
    ],
)
def test_qrels_in_every_format(write: Write, name: str, text: str) -> None:
    expected = [Qrel("q1", "d1", 1), Qrel("q1", "d2", 0), Qrel("q2", "d1", -1)]
    assert read_qrels(write(name, text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ": the file is empty"),
        ("query-id\tcorpus-id\tscore\n", ": the file holds no judgement"),
        (
            "q 0 d 1\nq d\n",
            ":2: 2 columns; a judgement has 4 (query 0 document relevance) or 3 (query-id corpus-id score)",
        ),
        ("q 0 d 1\n\n", ":2: blank line"),
        ("q 0 d 1\nq 0 e 0.5\n", ":2: the relevance '0.5' is not a whole number"),
        ("q\td\tnan\nq\te\t1\n", ":1: the relevance 'nan' is not a whole number"),
        ("q\td\t0.5\nq\te\t1\n", ":1: the relevance '0.5' is not a whole number"),
        ("q 0 d inf\n", ":1: the relevance 'inf' is not a whole number"),
        ("q 0 d true\n", ":1: the relevance 'true' is not a whole number"),
        ("q 0 d 1_0\n", ":1: the relevance '1_0' is not a whole number"),
        (f"q 0 d {'9' * 25}\n", f":1: the relevance '{'9' * 25}' is not a whole number"),
        ("q 0 d 1\nq 0 e 1\nq 0 d 1\n", ":3: query 'q' and document 'd' are judged twice: line 1"),
        (b"q 0 d 1\nq 0 \xff 1\n", ":2: not UTF-8 at offset 4"),
    ],
)
def test_bad_qrels(write: Write, text: str | bytes, expected: str) -> None:
    path = write("q.tsv", text)
    with pytest.raises(DataError) as caught:
        read_qrel_lines(path)
    assert str(caught.value) == f"{path}{expected}"


def test_numbers_of_thousands_of_digits_are_bad_lines(write: Write) -> None:
    digits = "9" * 5000  # more than Python turns into a number
    for text, read in ((f"q 0 d {digits}\n", read_qrel_lines), (f"q Q0 d {digits} 1 t\n", read_run)):
        path = write("file", text)
        with pytest.raises(DataError, match="is not a whole number"):
            read(path)  # type: ignore[operator]


def test_every_spelling_of_a_score_is_read(write: Write) -> None:
    scores = ["1", "-1.5", "+2.", ".25", "1e3", "-1.25E-2", "007"]
    lines = "".join(f"q Q0 d{number} 1 {score} t\n" for number, score in enumerate(scores))
    found = {hit.document_id: hit.score for hit in read_run(write("run", lines))["q"]}
    assert found == {f"d{number}": float(np.float32(float(score))) for number, score in enumerate(scores)}


def test_ranks_follow_score_then_document_id_descending() -> None:
    hits = rank_hits("q", [("d1", 1.0), ("d10", 2.0), ("d2", 1.0), ("é", 1.0), ("e", 3)])
    assert hits == [
        Hit("q", "e", 1, 3.0),
        Hit("q", "d10", 2, 2.0),
        Hit("q", "é", 3, 1.0),
        Hit("q", "d2", 4, 1.0),
        Hit("q", "d1", 5, 1.0),
    ]


def test_scores_equal_as_float32_are_ties() -> None:
    assert [hit.document_id for hit in rank_hits("q", [("a", 1.0 + 1e-12), ("b", 1.0)])] == ["b", "a"]


def test_our_ranks_are_those_of_trec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = random.Random(0)
    for _ in range(20):
        scored = {f"d{n}": rng.choice([0.1, 0.2, 0.3]) for n in range(30)}
        relevant = rng.choice(sorted(scored))
        rank = next(hit.rank for hit in rank_hits("q", scored.items()) if hit.document_id == relevant)
        evaluator = pytrec_eval.RelevanceEvaluator({"q": {relevant: 1}}, {"recip_rank"})
        assert evaluator.evaluate({"q": scored})["q"]["recip_rank"] == pytest.approx(1 / rank)


def test_a_run_reads_back_bit_for_bit(tmp_path: Path) -> None:
    rng = random.Random(1)
    bits = [rng.getrandbits(32) for _ in range(5000)] + [0, 0x80000000, 1, 0x7F7FFFFF, 0x3DCCCCCD]
    scores = [value for value in (struct.unpack("f", struct.pack("I", n))[0] for n in bits) if math.isfinite(value)]
    hits = {"q1": rank_hits("q1", ((f"d{n}", score) for n, score in enumerate(scores))), "q0": [Hit("q0", "d", 9, 0.1)]}
    write_run(tmp_path / "run", hits, tag="mine")
    back = read_run(tmp_path / "run")
    assert list(back) == ["q1", "q0"]
    assert back["q1"] == hits["q1"]
    assert [struct.pack("f", hit.score) for hit in back["q1"]] == [struct.pack("f", hit.score) for hit in hits["q1"]]
    assert back["q0"] == [Hit("q0", "d", 1, float(np.float32(0.1)))]
    assert (tmp_path / "run").read_text().splitlines()[-1] == "q0 Q0 d 1 0.1 mine"


def test_a_run_is_written_in_rank_order_whatever_the_order_given(tmp_path: Path) -> None:
    given = [Hit("q", name, 0, score) for name, score in (("a", 0.5), ("b", 0.5), ("c", 0.75))]
    for number, order in enumerate(itertools.permutations(given)):
        write_run(tmp_path / f"run{number}", {"q": order})
    texts = {path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"q Q0 c 1 0.75 llara\nq Q0 b 2 0.5 llara\nq Q0 a 3 0.5 llara\n"}


def test_a_run_is_written_as_its_queries_come(tmp_path: Path) -> None:
    hits = {"q2": [Hit("q2", "d", 1, 1.5)], "q3": [], "q1": [Hit("q1", "e", 1, 0.5), Hit("q1", "d", 2, 0.25)]}
    write_run(tmp_path / "whole", hits)
    write_run(tmp_path / "piecewise", (pair for pair in hits.items()))
    assert (tmp_path / "piecewise").read_bytes() == (tmp_path / "whole").read_bytes()
    assert list(read_run(tmp_path / "piecewise")) == ["q2", "q1"]


def test_a_run_with_a_score_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the score of document 'd' for query 'q' is nan"):
        write_run(tmp_path / "run", {"p": [Hit("p", "d", 1, 1.0)], "q": [Hit("q", "d", 1, math.nan)]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q Q0 d 1 0.5\n", ":1: 5 columns; a run has 6 (query Q0 document rank score tag)"),
        (
            "q Q0 d 1 0.5 t\nq Q0 e 0.4 2 t\n",
            ":2: the rank '0.4' is not a whole number (column 4; the score is column 5)",
        ),
        ("q Q0 d 1 high t\n", ":1: the score 'high' is not a finite float32 number"),
        ("q Q0 d 1 nan t\n", ":1: the score 'nan' is not a finite float32 number"),
        ("q Q0 d 1 -inf t\n", ":1: the score '-inf' is not a finite float32 number"),
        ("q Q0 d 1 1_000 t\n", ":1: the score '1_000' is not a finite float32 number"),
        ("q Q0 d 1 1e300 t\n", ":1: the score '1e300' is not a finite float32 number"),
        ("q Q0 d 1 0.5 t\nr Q0 d 1 0.5 t\nq Q0 d 2 0.4 t\n", ":3: document 'd' stands twice under query 'q'"),
        ("q Q0 d 1 0.5 t\n\n", ":2: blank line"),
    ],
)
def test_bad_runs(write: Write, text: str, expected: str) -> None:
    path = write("run.txt", text)
    with pytest.raises(DataError) as caught:
        read_run(path)
    assert str(caught.value) == f"{path}{expected}"


def test_a_run_without_hits_reads_back(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"q": []})
    (tmp_path / "run.gz").write_bytes(gzip.compress(b""))
    assert [read_run(tmp_path / name) for name in ("run", "run.gz")] == [{}, {}]
    with pytest.raises(DataError, match="no such file"):
        read_run(tmp_path / "nothing")
