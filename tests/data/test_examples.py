"""Training examples from JSON lines and from collections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.examples import read_examples
from llara.errors import DataError
from llara.records import Example, Passage

Write = Callable[[str, Any], Path]


def test_texts_and_objects(write: Write) -> None:
    path = write(
        "t.jsonl.gz",
        [
            {
                "query": "q1",
                "pos": ["a", {"title": "T", "text": "b"}],
                "neg": [{"text": "c"}, "d"],
                "pos_scores": [1, 2],
                "neg_scores": [0.5, -1],
            },
            {"query": "q2", "pos": ["a"]},
        ],
    )
    assert read_examples([path]) == [
        Example("q1", (Passage("a"), Passage("b", "T")), (Passage("c"), Passage("d")), (1.0, 2.0), (0.5, -1.0)),
        Example("q2", (Passage("a"),), ()),
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"query": "q", "pos": "text"},
            "the field pos must be a list of texts or of objects with title and text, but is a string",
        ),
        (
            {"query": "q", "pos": ["a"], "neg": "text"},
            "the field neg must be a list of texts or of objects with title and text, but is a string",
        ),
        (
            {"query": "q", "pos": None},
            "the field pos must be a list of texts or of objects with title and text, but is null",
        ),
        ({"query": "q", "pos": []}, "pos is empty: an example needs at least one relevant passage"),
        ({"query": "q"}, "no field pos"),
        ({"query": "q", "poss": ["a"]}, "no field pos (did you mean 'poss'?)"),
        ({"pos": ["a"]}, "no field query"),
        ({"query": "", "pos": ["a"]}, "empty query"),
        ({"query": 3, "pos": ["a"]}, "the field query is not text but a number"),
        ({"query": "q", "pos": ["a", " "]}, "empty passage in pos[1]"),
        ({"query": "q", "pos": ["a"], "neg": [""]}, "empty passage in neg[0]"),
        ({"query": "q", "pos": [["a"]]}, "pos[0] is neither text nor an object with text but a list"),
        ({"query": "q", "pos": [{"title": "T"}]}, "no pos[0].text"),
        ({"query": "q", "pos": [{"text": "a", "title": 1}]}, "the field pos[0].title is not text but a number"),
        ({"query": "q", "pos": ["a", "b"], "neg": ["c", " b"]}, "neg[1] is also a positive: ' b'"),
        ({"query": "q", "pos": ["a\x00"]}, "the field pos[0] holds a NUL character at offset 1"),
        ([1], "not a JSON object but a list"),
    ],
)
def test_bad_rows(write: Write, row: Any, expected: str) -> None:
    path = write("t.jsonl", [{"query": "q", "pos": ["a"]}, row])
    with pytest.raises(DataError) as caught:
        read_examples([path])
    assert str(caught.value) == f"{path}:2: {expected}"


def test_the_same_text_under_another_title_is_another_passage(write: Write) -> None:
    row = {"query": "q", "pos": [{"title": "A", "text": "x"}], "neg": [{"title": "B", "text": "x"}]}
    assert read_examples([write("t.jsonl", [row])])[0].negatives == (Passage("x", "B"),)


def test_files_that_are_no_training_data(write: Write) -> None:
    path = write("t.txt", "text")
    with pytest.raises(DataError) as caught:
        read_examples([path])
    assert str(caught.value) == (
        f"{path}: training data is JSON lines with query, pos, neg, or of Tevatron's layouts, a .tsv of pairs or "
        "triples, or a collection (BEIR folder, pairs, SQuAD JSON)"
    )
    with pytest.raises(DataError, match="the file is empty"):
        read_examples([write("t.jsonl", "")])


def test_ids_cannot_be_read_into_memory(write: Write) -> None:
    path = write("t.jsonl", [{"query_text": "q", "positive_document_ids": ["a"]}])
    with pytest.raises(DataError, match=r"t.jsonl:1: names its passages by id, not by text"):
        read_examples([path])
    with pytest.raises(DataError, match=r"t.tsv:1: names its query by id, not by text"):
        read_examples([write("t.tsv", "1\t0\t2\t1\n")])


def test_a_collection_gives_one_example_per_query_with_all_positives(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq40\td40\t1\nq40\td1\t2\nq40\td2\t0\nq41\td5\t0\n"
    )
    assert read_examples([beir], "test") == [Example("query 40", (Passage("text 40", "T40"), Passage("text 1", "T1")))]
    assert len(read_examples([beir, beir], "train-all")) == 80


def test_a_judged_document_that_the_corpus_lacks_names_its_line(beir: Path) -> None:
    path = beir / "qrels" / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq40\td40\t1\nq40\td99\t0\nq40\td77\t1\n")
    with pytest.raises(DataError) as caught:
        read_examples([beir], "test")
    assert str(caught.value) == f"{path}:4: the corpus has no document with the id 'd77'"


def test_a_split_without_relevant_documents_is_an_error(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text("q40\td40\t0\n")
    with pytest.raises(DataError, match=r"no training example: no query has a relevant document$"):
        read_examples([beir], "test")
    with pytest.raises(DataError, match="no split 'none'"):
        read_examples([beir], "none")


def test_equal_positives_of_pairs_count_once(shared: Path) -> None:
    examples = read_examples([shared / "data" / "medquad" / "pairs.jsonl.gz", shared / "data" / "scifact"])
    assert len(examples) == 11047 + 655
    assert all(len(set(example.positives)) == len(example.positives) >= 1 for example in examples)
    assert all(not passage.title for passage in examples[0].positives)
    assert examples[-1].positives[0].title
