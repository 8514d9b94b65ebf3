"""Training examples on disk are those that the rows hold, whatever their layout."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data import store
from llara.data.examples import read_examples
from llara.data.store import ExampleSet, SetSource, TrainingData, prepare_examples
from llara.errors import DataError, StorageError
from llara.records import Example

Write = Callable[[str, Any], Path]


def resolved(examples: ExampleSet) -> list[Example]:
    """The examples with their texts in place of numbers."""
    found = []
    for number in range(len(examples)):
        stored = examples[number]
        passages = [tuple(map(examples.passage, numbers)) for numbers in stored[1:3]]
        found.append(Example(stored.query, *passages, stored.positive_scores, stored.negative_scores))
    return found


def prepared(folder: Path, *paths: Path, split: str = "train", scored: bool = False, **data: Any) -> list[ExampleSet]:
    sets = [SetSource(path, split, scored) for path in paths]
    return prepare_examples(folder / "examples", TrainingData(sets, **data))


def test_sets_equal_what_is_read_into_memory(write: Write, beir: Path, tmp_path: Path) -> None:
    lines = write(
        "t.jsonl",
        [
            {"query": "q1", "pos": ["a", {"title": "T", "text": "b"}], "neg": ["c"]},
            {"query": "q2", "pos": ["ü"], "neg": ["d", "e"], "pos_scores": [3], "neg_scores": [1, 2.5]},
        ],
    )
    triples = write("t.tsv", "q\ta\tb\nr\tc\td\n")
    sets = prepared(tmp_path, lines, beir, triples, split="train-all")
    assert [item.name for item in sets] == [str(lines), str(beir), str(triples)]
    for item, path in zip(sets, (lines, beir, triples), strict=True):
        assert resolved(item) == read_examples([path], "train-all")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")) == []


def test_a_collection_may_stand_for_a_set_per_split(beir: Path, tmp_path: Path) -> None:
    data = TrainingData([SetSource(beir, "train"), SetSource(beir, "dev"), SetSource(beir, "train")])
    train, dev, again = prepare_examples(tmp_path / "examples", data)
    assert resolved(train) == resolved(again) == read_examples([beir], "train")
    assert resolved(dev) == read_examples([beir], "dev")
    assert not {item.query for item in resolved(train)} & {item.query for item in resolved(dev)}


def test_real_collections_equal_what_is_read_into_memory(shared: Path, tmp_path: Path) -> None:
    paths = [shared / "data" / "medquad" / "pairs.jsonl.gz", shared / "data" / "scifact"]
    for item, path in zip(prepared(tmp_path, *paths), paths, strict=True):
        assert resolved(item) == read_examples([path])


CORPUS = [{"docid": f"d{n}", "title": f"T{n}", "text": f"text {n}"} for n in range(5)]
QUERIES = "q0\tquery 0\nq1\tquery 1\n"


@pytest.fixture
def corpus(write: Write) -> Path:
    return write("corpus.jsonl", CORPUS)


@pytest.fixture
def queries(write: Write) -> Path:
    return write("queries.tsv", QUERIES)


def short(examples: ExampleSet) -> list[tuple[str, list[str], list[str]]]:
    """Query, and the titles of positives and negatives."""
    return [
        (item.query, [passage.title for passage in item.positives], [passage.title for passage in item.negatives])
        for item in resolved(examples)
    ]


def test_ids_are_looked_up_in_the_corpus_and_the_queries(
    write: Write, corpus: Path, queries: Path, tmp_path: Path
) -> None:
    by_id = write("t.jsonl", [{"query_text": "q", "positive_document_ids": ["d1"], "negative_document_ids": ["d0"]}])
    triples, qrels = write("t.tsv", "q1\td2\td3\n"), write("qrels.tsv", "q0\t0\td4\t1\n")
    texts = write("own.jsonl", [{"query": "own", "pos": [{"title": "own", "text": "x"}]}])
    sets = prepared(tmp_path, by_id, triples, qrels, texts, corpus=(corpus,), queries=queries)
    assert [short(item) for item in sets] == [
        [("q", ["T1"], ["T0"])],
        [("query 1", ["T2"], ["T3"])],
        [("query 0", ["T4"], [])],
        [("own", ["own"], [])],
    ]
    assert sorted(path.name for path in (tmp_path / "examples").iterdir()) == sorted(
        [f"examples-{n}.{end}" for n in range(4) for end in ("jsonl", "starts")]
        + ["passages.jsonl", "passages.starts", "sets.json"]
    )


def test_ids_may_be_those_of_a_beir_folder(write: Write, beir: Path, tmp_path: Path) -> None:
    triples = write("t.tsv", "q3\td4\td5\n")
    assert short(prepared(tmp_path, triples, corpus=(beir,), queries=beir)[0]) == [("query 3", ["T4"], ["T5"])]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", '{"query_text": "q", "positive_document_ids": ["d9"]}\n', "the corpus has no document with"),
        ("t.tsv", "q0\td1\td9\n", "the corpus has no document with the id 'd9'"),
        ("t.tsv", "q9\td1\td2\n", "the queries have none with the id 'q9'"),
        ("t.tsv", "q9\t0\td2\t1\n", "the queries have none with the id 'q9'"),
    ],
)
def test_an_id_that_is_missing_names_its_line(
    write: Write, corpus: Path, queries: Path, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, path, corpus=(corpus,), queries=queries)
    assert str(caught.value).startswith(f"{path}:1: {reason}")
    assert not list(tmp_path.glob("*examples*"))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", '{"query_text": "q", "positive_document_ids": ["d1"]}\n', "names documents by their ids; give --c"),
        ("t.tsv", "q0\t0\td1\t1\n", "names queries by their ids; give --queries, where they stand"),
    ],
)
def test_ids_without_a_place_to_look_them_up(
    write: Write, tmp_path: Path, name: str, content: str, reason: str
) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, path)
    assert str(caught.value).startswith(f"{path}:1: {reason}")


def test_repeated_ids_name_their_line(write: Write, corpus: Path, queries: Path, tmp_path: Path) -> None:
    triples = write("t.tsv", "q1\td2\td3\n")
    twice = write("twice.jsonl", [*CORPUS, CORPUS[2]])
    with pytest.raises(DataError, match=r"twice.jsonl:6: duplicate document id 'd2'"):
        prepared(tmp_path, triples, corpus=(twice,), queries=queries)
    twice = write("twice.tsv", QUERIES + "q0\tx\n")
    with pytest.raises(DataError, match=r"twice.tsv:3: duplicate query id 'q0'"):
        prepared(tmp_path, triples, corpus=(corpus,), queries=twice)


def test_scores_can_be_asked_for(write: Write, beir: Path, tmp_path: Path) -> None:
    scored = {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [2], "neg_scores": [1]}
    good = write("good.jsonl", [scored, {"query": "q", "pos": ["a"], "pos_scores": [2]}])
    assert len(prepared(tmp_path / "1", good, scored=True)[0]) == 2
    bad = write("bad.jsonl", [scored, {"query": "q", "pos": ["a"]}])
    with pytest.raises(DataError, match=r"bad.jsonl:2: no pos_scores and neg_scores, which --distill needs"):
        prepared(tmp_path / "bad", bad, scored=True)
    with pytest.raises(DataError, match="a collection has no teacher's scores"):
        prepared(tmp_path / "2", beir, scored=True)


def test_bad_rows_sets_without_examples_and_missing_files_leave_nothing(
    write: Write, beir: Path, tmp_path: Path
) -> None:
    (beir / "qrels" / "test.tsv").write_text("q40\td40\t0\n")
    bad = write("t.jsonl", [{"query": "q", "pos": ["a"]}, {"query": "q", "pos": "a"}])
    before = sorted(path.name for path in tmp_path.iterdir())
    for path, reason in (
        (bad, r"t.jsonl:2: the field pos must be a list"),
        (beir, "no training example: no query has a relevant document"),
        (write("qrels.tsv", "1\t0\t2\t0\n"), "no training example"),
        (tmp_path / "none", "no such file or folder"),
    ):
        with pytest.raises(DataError, match=reason):
            prepared(tmp_path, path, split="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "qrels.tsv"])


def test_a_judged_document_that_the_corpus_lacks_names_its_line(beir: Path, tmp_path: Path) -> None:
    path = beir / "qrels" / "test.tsv"
    path.write_text("q40\td40\t1\nq40\td77\t1\n")
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, beir, split="test")
    assert str(caught.value) == f"{path}:2: the corpus has no document with the id 'd77'"


def test_what_is_prepared_is_read_once(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("t.jsonl", [{"query": "q", "pos": ["a"]}])
    first = resolved(prepared(tmp_path, path)[0])
    monkeypatch.setattr(store, "_convert", lambda *_: pytest.fail("was read again"))
    assert resolved(prepared(tmp_path, path)[0]) == first


def test_a_half_prepared_folder_is_made_anew(write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", [{"query": "q", "pos": ["a"]}])
    prepared(tmp_path, path)
    shutil.copytree(tmp_path / "examples", tmp_path / ".tmp-examples")
    (tmp_path / "examples" / "sets.json").unlink()
    assert len(prepared(tmp_path, path)[0]) == 1
    assert not (tmp_path / ".tmp-examples").exists()


def test_damage_is_found_when_it_is_opened(write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", [{"query": "q", "pos": ["a"]}])
    prepared(tmp_path, path)
    damaged = tmp_path / "examples" / "passages.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"a", b"b"))
    with pytest.raises(StorageError, match="to read the examples again"):
        prepared(tmp_path, path)


def test_memory_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    row = json.dumps({"query": "q", "pos": ["text " * 100], "neg": ["more text " * 50] * 4}) + "\n"

    def peak(name: str, rows: int) -> int:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(row * rows)
        tracemalloc.start()
        try:
            prepared(tmp_path / name, path)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small = peak("small", 50)
    assert peak("large", 1500) - small < 0.1 * 1450 * len(row)
