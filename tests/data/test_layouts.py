"""Every layout of training data, and what makes a row of it bad."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.layouts import ById, TrainingRow, read_training_rows
from llara.errors import DataError
from llara.records import Passage

Write = Callable[[str, Any], Path]
Parts = tuple[Any, ...]


def parts(path: Path, **options: bool) -> list[Parts]:
    """Rows without their places, and without what is empty at their end."""
    found = []
    for row in read_training_rows(path, **options):
        assert row.path == str(path)
        values: Parts = row[2:]
        while values and values[-1] == ():
            values = values[:-1]
        found.append(values)
    return found


def texts(*values: str) -> tuple[Passage, ...]:
    return tuple(map(Passage, values))


def ids(*values: str) -> tuple[ById, ...]:
    return tuple(map(ById, values))


def test_query_pos_neg_with_scores(write: Write) -> None:
    row = {"query": "q", "pos": ["a", {"title": "T", "text": "b"}], "neg": ["c"], "prompt": "not read"}
    path = write("t.jsonl", [row, {**row, "pos_scores": [1, 2.5], "neg_scores": [-3]}])
    passages = (Passage("a"), Passage("b", "T"))
    assert parts(path) == [("q", passages, texts("c")), ("q", passages, texts("c"), (1.0, 2.5), (-3.0,))]


def test_fields_of_others_are_left_alone_and_a_title_stands_for_a_text(write: Write) -> None:
    row = {"query": "q", "pos": [{"title": "T", "text": ""}], "prompt": "p", "type": "t", "query_id": 7, "pos_id": [1]}
    assert parts(write("t.jsonl", [row, {**row, "neg": [], "neg_scores": []}])) == [("q", (Passage("", "T"),))] * 2


def test_tevatron_with_passages(write: Write) -> None:
    row = {
        "query_id": "7",
        "query": "q",
        "positive_passages": [{"docid": "1", "title": "T", "text": "a"}, {"docid": "2", "text": "b"}],
        "negative_passages": [{"docid": "3", "title": "", "text": "c"}],
    }
    path = write("t.jsonl.gz", [row, {**row, "negative_passages": []}])
    positives = (Passage("a", "T"), Passage("b"))
    assert parts(path) == [("q", positives, texts("c")), ("q", positives)]


def test_tevatron_with_ids(write: Write) -> None:
    row = {
        "query_id": "7",
        "query_text": "q",
        "query_image": None,
        "positive_document_ids": ["d1", 2],
        "negative_document_ids": ["d3"],
        "answer": None,
    }
    scored = {**row, "negative_document_ids": None, "pos_scores": [1, 2]}
    assert parts(write("t.jsonl", [row, scored])) == [
        ("q", ids("d1", "2"), ids("d3")),
        ("q", ids("d1", "2"), (), (1.0, 2.0)),
    ]


def test_pairs(write: Write) -> None:
    assert parts(write("p.jsonl", [{"query": "q", "text": "a"}])) == [("q", texts("a"))]
    assert parts(write("p.tsv", "q one\ta\nr\tb two\n")) == [("q one", texts("a")), ("r", texts("b two"))]
    assert parts(write("i.tsv", "q1\t77\n"), ids=True) == [(ById("q1"), ids("77"))]


def test_triples(write: Write) -> None:
    assert parts(write("t.tsv.gz", "q\ta\tb\n")) == [("q", texts("a"), texts("b"))]
    assert parts(write("i.tsv", "1\t2\t3\n"), ids=True) == [(ById("1"), ids("2"), ids("3"))]


def test_judgements_that_follow_each_other_are_one_example(write: Write) -> None:
    path = write("qrels.tsv", "1\t0\t7\t1\n1\t0\t8\t2\n1\t0\t9\t0\n2\t0\t7\t0\n3\t0\t5\t1\n1\t0\t6\t1\n")
    expected = [(ById("1"), ids("7", "8")), (ById("3"), ids("5")), (ById("1"), ids("6"))]
    assert parts(path) == expected
    assert [row.line for row in read_training_rows(path)] == [1, 5, 6]


def test_rows_of_several_layouts_may_stand_in_one_file(write: Write) -> None:
    rows = [
        {"query": "q", "pos": ["a"]},
        {"query": "r", "text": "b"},
        {"query_text": "s", "positive_document_ids": ["c"]},
    ]
    assert parts(write("t.jsonl", rows)) == [("q", texts("a")), ("r", texts("b")), ("s", ids("c"))]


PASSAGES = {"query": "q", "positive_passages": [{"text": "a"}]}
IDS = {"query_text": "q", "positive_document_ids": ["a"]}
SCORED = {"query": "q", "pos": ["a"], "neg": ["b", "c"]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**SCORED, "pos_scores": [1, 2]}, "pos_scores holds 2 scores for the 1 passages in pos"),
        ({**SCORED, "neg_scores": [1]}, "neg_scores holds 1 scores for the 2 passages in neg"),
        ({**SCORED, "neg_scores": 1}, "the field neg_scores must be a list of numbers, but is a number"),
        ({**SCORED, "neg_scores": "12"}, "the field neg_scores must be a list of numbers, but is a string"),
        ({**SCORED, "neg_scores": [1, "2"]}, "neg_scores[1] is not a number but a string"),
        ({**SCORED, "neg_scores": [True, 2]}, "neg_scores[0] is not a number but true or false"),
        ({**SCORED, "neg_scores": [1, 10**400]}, "neg_scores[1] is not a finite float32 number"),
        ({**SCORED, "neg_scores": [1, 1e39]}, "neg_scores[1] is not a finite float32 number"),
        ({**SCORED, "pos_scores": [1]}, "has pos_scores but no neg_scores; a teacher scores all"),
        (
            {**SCORED, "neg_scores": [1, 2]},
            "has neg_scores but no pos_scores; a teacher scores all",
        ),
        ({"query": "q", "pos": ["a"], "negs": ["b"]}, "no field neg, but 'negs'; rename it"),
        ({**SCORED, "pos_score": [1], "neg_score": [2, 3]}, "no field pos_scores, but 'pos_score'; rename it"),
        ({**IDS, "negative_documents_ids": ["b"]}, "no field negative_document_ids, but 'negative_documents_ids'"),
        (
            {"query": "q", "pos": [{"title": "T\0", "text": "a"}]},
            "the field pos[0].title holds a NUL character at offset 1",
        ),
        ({"query": "q", "pos": [{"title": " ", "text": ""}]}, "empty passage in pos[0]"),
        ({"query": "q", "pos": [{"title": "T", "text": "a"}], "neg": ["b", "T a"]}, "neg[1] is also a positive: 'T a'"),
        (
            {"query": "q", "positive_passages": "a"},
            "the field positive_passages must be a list of texts or of objects with title and text, but is a string",
        ),
        ({"query": "q", "positive_passages": []}, "positive_passages is empty: an example needs at least one relevant"),
        ({**PASSAGES, "query": " "}, "empty query"),
        ({**PASSAGES, "negative_passages": [{"title": "T"}]}, "no negative_passages[0].text"),
        ({**PASSAGES, "negative_passages": [{"text": ""}]}, "empty passage in negative_passages[0]"),
        ({**PASSAGES, "negative_passages": [{"text": " a"}]}, "negative_passages[0] is also a positive: ' a'"),
        (
            {**IDS, "positive_document_ids": "a"},
            "the field positive_document_ids must be a list of document ids, but is a string",
        ),
        ({**IDS, "positive_document_ids": []}, "positive_document_ids is empty: an example needs at least one relevan"),
        ({**IDS, "positive_document_ids": [None]}, "the document id is not a string or a number but null"),
        ({**IDS, "negative_document_ids": ["b", "a"]}, "negative_document_ids[1] is also a positive: 'a'"),
        ({**IDS, "query_image": "x.png"}, "holds a query_image; queries are text"),
        ({"positive_document_ids": ["a"]}, "no query_text"),
        ({**IDS, "query_text": ""}, "empty query"),
        ({"query": "q", "text": ""}, "empty passage"),
        ({"query": "q", "text": ["a"]}, "the field text is not text but a list"),
        (
            {"query": "q", "text": "a", "neg": "b"},
            "holds neg beside text, which are of different layouts; name passages",
        ),
        (
            {"query": "q", "text": "a", "pos_scores": [1]},
            "holds pos_scores beside text, which has none; name passages",
        ),
        ({"query": "q", "text": "a", "negs": ["b"]}, "no field neg, but 'negs'; rename it"),
        ({"query": "q", "text": "a", "negative": "b"}, "no field neg, but 'negative'; rename it"),
        ({"query": "q", "pos": ["a"], "hard_negatives": ["b"]}, "no field neg, but 'hard_negatives'; rename it"),
        (
            {"query": "q", "pos": ["a"], "negative_passages": ["b"]},
            "holds negative_passages beside pos, which are of different layouts; rename negative_passages to neg",
        ),
        (
            {"query": "q", "positive_passages": ["a"], "neg": ["b"]},
            "holds neg beside positive_passages, which are of different layouts; rename neg to negative_passages",
        ),
        (
            {"query_text": "q", "positive_document_ids": ["1"], "neg": ["b"]},
            "holds neg beside positive_document_ids, which are of different layouts; rename neg to negative_",
        ),
        (
            {"query": "q", "pos": ["a"], "positive_passages": ["b"]},
            "holds pos beside positive_passages, which are of different layouts; keep one of the two",
        ),
        (
            {"query": "q", "pos": ["a"], "neg": None, "hard_negatives": ["b"]},
            "no field neg, but 'hard_negatives'; rename",
        ),
        ({"query_text": "q", "positive_document_ids": ["1"], "negative_document_ids": ""}, "the field negative_docu"),
    ],
)
def test_bad_objects(write: Write, row: Any, expected: str) -> None:
    path = write("t.jsonl", [{"query": "q", "pos": ["a"]}, row])
    with pytest.raises(DataError) as caught:
        list(read_training_rows(path))
    assert str(caught.value).startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("first", "line", "options", "expected"),
    [
        ("q\ta\tb", "q\ta", {}, "2 columns where the rows before have 3"),
        ("q\ta", "q", {}, "1 tab-separated columns; training data has 2 (query, text), 3"),
        ("q\ta", "q\t\t\t\ta", {}, "5 tab-separated columns; training data has"),
        ("q\ta", " ", {}, "blank line"),
        ("q\ta", "q\t ", {}, "empty positive"),
        ("q\ta\tb", " \ta\tb", {}, "empty query"),
        ("q\ta\tb", "q\ta\t", {}, "empty negative"),
        ("q\ta\tb", "q\ta\ta", {}, "the negative is also the positive"),
        ("q\ta\tb", "1\t2\t3", {}, "the columns look like ids; say what they stand for with --queries and --corpus"),
        ("1\t2\t3", "1\t2\t2", {"ids": True}, "the negative is also the positive"),
        ("1\t2\t3", "1\t2\t", {"ids": True}, "the column's id is empty"),
        ("1\t0\t3\t1", "1\t0\t4\tyes", {}, "the relevance 'yes' is not a whole number"),
        ("1\t0\t3\t1", "1\t0\t\t1", {}, "the document id is empty"),
    ],
)
def test_bad_columns(write: Write, first: str, line: str, options: dict[str, bool], expected: str) -> None:
    path = write("t.tsv", f"{first}\n{line}\n")
    with pytest.raises(DataError) as caught:
        list(read_training_rows(path, **options))
    assert str(caught.value).startswith(f"{path}:2: {expected}")


def test_the_first_of_bad_rows_is_named_before_the_rest_is_read(write: Write) -> None:
    rows = read_training_rows(write("t.jsonl", [{"query": "q", "pos": ["a"]}, {"query": "q"}]))
    assert next(rows) == TrainingRow(str(write("t.jsonl", [])), 1, "q", texts("a"))


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "pos": ["a"], "neg": None, "negative_passages": None, "text": "metadata"},
        {"query": "q", "positive_passages": ["a"], "negative_passages": None, "neg": []},
        {"query": "q", "text": "a", "pos": None, "neg": None, "neg_scores": None},
        {"query": "q", "text": "metadata", "pos": ["a"], "positive_passages": [], "negatives": None, "Negatives": []},
    ],
)
def test_columns_that_a_table_leaves_empty_are_no_passages(write: Write, row: Any) -> None:
    path = write("t.jsonl", [row])
    assert list(read_training_rows(path)) == [TrainingRow(str(path), 1, "q", texts("a"))]
