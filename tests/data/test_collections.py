"""BEIR folders, pairs files and SQuAD JSON as collections with fixed splits."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.data.collections import is_collection, open_collection, read_qrels, refuse_splits
from llara.data.splits import normalise, split_by_focus
from llara.errors import ConfigError, DataError
from llara.records import Qrel, Query

Write = Callable[[str, Any], Path]


def opened(path: Path) -> Any:
    collection = open_collection(path)
    assert collection is not None
    return collection


def test_what_is_no_collection(write: Write, tmp_path: Path) -> None:
    assert open_collection(write("a.tsv", "1\tx")) is None
    assert open_collection(write("a.jsonl", [{"_id": "1", "text": "x"}])) is None
    assert open_collection(write("b.jsonl", "{oops\n")) is None
    assert open_collection(write("folder/a.txt", "x").parent) is None
    with pytest.raises(DataError, match="no such file or folder"):
        open_collection(tmp_path / "no")
    with pytest.raises(DataError, match="the file is empty"):
        open_collection(write("e.jsonl", ""))


def test_a_split_of_what_has_none_is_refused(write: Write, beir: Path, squad: Callable[..., str]) -> None:
    plain = [write("a.tsv", "1\tx"), write("a.jsonl", [{"query": "q", "pos": ["a"]}])]
    collections = [
        *(beir, write("s.json", squad(("T", [("text", [("1", "asked")])])))),
        write("p.jsonl", [{"_id": "1", "question": "q", "answer": "a"}]),
    ]
    assert [is_collection(path) for path in plain + collections] == [False, False, True, True, True]
    with pytest.raises(ConfigError) as caught:
        refuse_splits("--split", "test", "train", plain)
    listed = ", ".join(map(str, plain))
    assert str(caught.value) == (
        f"--split: 'test' would be the split of a collection, and {listed} has none; leave it out"
    )
    refuse_splits("--split", "train", "train", plain)
    for collection in collections:
        refuse_splits("--split", "test", "train", [*plain, collection])


def test_a_folder_named_like_judgements_is_no_split(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").unlink()
    (beir / "qrels" / "test.tsv").mkdir()
    with pytest.raises(DataError, match=r"no split 'test'; it has dev, train, train-all"):
        opened(beir).qrels("test")


def test_beir_dev_is_a_fixed_part_of_train(beir: Path) -> None:
    collection = opened(beir)
    assert collection.splits == ("dev", "test", "train", "train-all")
    dev, train = collection.qrels("dev"), collection.qrels("train")
    assert [qrel.query_id for qrel in dev] == ["q16", "q19", "q20", "q33", "q36"]
    assert sorted(dev + train) == sorted(collection.qrels("train-all"))
    assert {query.id for query in collection.queries("dev")} == {qrel.query_id for qrel in dev}


def test_beir_dev_file_wins(beir: Path) -> None:
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq41\td3\t2\n")
    collection = opened(beir)
    assert collection.qrels("dev") == [Qrel("q41", "d3", 2)]
    assert len(collection.qrels("train")) == len(collection.qrels("train-all")) == 40


def test_a_judgement_of_an_unknown_query_names_its_line(beir: Path) -> None:
    path = beir / "qrels" / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq40\td40\t1\nq99\td1\t1\n")
    with pytest.raises(DataError) as caught:
        opened(beir).queries("test")
    assert str(caught.value) == f"{path}:3: no query has the id 'q99'"


def test_unknown_splits_name_the_known_ones(beir: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(beir).qrels("tset")
    known = "it has dev, test, train, train-all"
    assert str(caught.value) == f"{beir}: no split 'tset' (did you mean 'test'?); {known}"
    for path in (beir / "qrels").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no split 'test'; it has no judgements$"):
        opened(beir).qrels("test")
    (beir / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"the BEIR folder holds no queries\.jsonl$"):
        opened(beir).queries()


def pair(number: int, question: str, answer: str, focus: str = "one") -> dict[str, str]:
    return {"_id": str(number), "source": "S", "focus": focus, "question": question, "answer": answer}


def test_equal_questions_are_one_query_and_equal_answers_all_relevant(write: Write) -> None:
    rows = [
        pair(1, "What is it?", "First answer."),
        pair(2, "what  IS it?", "Second answer."),
        pair(3, "Where is it?", "first  answer."),
        pair(4, "Who is it?", "Nobody."),
    ]
    path = write("pairs.jsonl", rows)
    collection = opened(path)
    ids = [document.id for document in collection.documents()]
    assert [name.partition("-")[0] for name in ids] == ["1", "2", "3", "4"]
    split = split_by_focus("one")
    assert (
        collection.queries(split)
        == collection.queries()
        == [
            Query(f"q-{ids[0]}", "What is it?"),
            Query(f"q-{ids[2]}", "Where is it?"),
            Query(f"q-{ids[3]}", "Who is it?"),
        ]
    )
    judged = defaultdict(set)
    for qrel in read_qrels(path, split):
        judged[qrel.query_id].add(qrel.document_id)
    assert judged == {
        f"q-{ids[0]}": {ids[0], ids[1], ids[2]},
        f"q-{ids[2]}": {ids[0], ids[2]},
        f"q-{ids[3]}": {ids[3]},
    }
    assert collection.splits == ("train", "dev", "test")


def test_an_answer_of_dev_or_test_is_no_positive_of_train(write: Write) -> None:
    train, dev, test = "Gout", "Rabies", next(f"F{n}" for n in range(99) if split_by_focus(f"F{n}") == "test")
    assert (split_by_focus(train), split_by_focus(dev)) == ("train", "dev")
    rows = [
        pair(1, "What is gout?", "A disease.", train),
        pair(2, "Who treats gout?", "See your  doctor.", train),
        pair(3, "What is gout?", "SEE your doctor.", train),
        pair(4, "Where to read on?", "See the leaflet.", train),
        pair(5, "Who treats rabies?", "See your doctor.", dev),
        pair(6, "What to read?", "see the leaflet.", test),
    ]
    path = write("pairs.jsonl", rows)
    collection = opened(path)
    assert [query.text for query in collection.queries("train")] == ["What is gout?"]
    assert [query.text for query in collection.queries("dev")] == ["Who treats rabies?"]
    assert [query.text for query in collection.queries("test")] == ["What to read?"]
    ids = {document.id.partition("-")[0]: document.id for document in collection.documents()}
    assert len(ids) == 6, "the corpus stays whole"
    assert {qrel.document_id for qrel in collection.qrels("train")} == {ids["1"]}
    # Whoever returns the copy that stands in train has still answered the question.
    assert {qrel.document_id for qrel in collection.qrels("dev")} == {ids["2"], ids["3"], ids["5"]}
    assert {qrel.document_id for qrel in collection.qrels("test")} == {ids["4"], ids["6"]}


def test_bad_pairs_name_their_line(write: Write) -> None:
    good = pair(1, "Q?", "A.")
    for bad, reason in [
        ({**good, "answer": ""}, "empty answer"),
        ({**good, "question": 3}, "the field question is not text but a number"),
        ({"_id": "2", "text": "x"}, "a pair has the fields question and answer, and no text"),
        (good, "the same _id and question as in line 1"),
    ]:
        path = write("pairs.jsonl", [good, bad])
        with pytest.raises(DataError) as caught:
            open_collection(path)
        assert str(caught.value) == f"{path}:2: {reason}"


def test_squad_questions_are_the_test_split(write: Write, squad: Callable[..., str]) -> None:
    collection = opened(write("s.json", squad(("T", [("one", [("a", "q1"), ("b", "q2")]), ("two", [("c", "q3")])]))))
    assert collection.splits == ("test",)
    assert collection.queries("test") == [Query("a", "q1"), Query("b", "q2"), Query("c", "q3")]
    assert collection.qrels("test") == [Qrel("a", "T-1", 1), Qrel("b", "T-1", 1), Qrel("c", "T-2", 1)]
    with pytest.raises(DataError, match=r"no split 'train'; it has test$"):
        collection.qrels("train")


def test_bad_squad_questions(write: Write, squad: Callable[..., str]) -> None:
    path = write("s.json", squad(("T", [("one", [("a", "q1")]), ("two", [("a", "q3")])])))
    with pytest.raises(DataError, match=r"s\.json: duplicate question id 'a'$"):
        open_collection(path)
    path = write("s.json", squad(("T", [("one", [("a", " ")])])))
    with pytest.raises(DataError, match=r"empty question or question id in the paragraph 'T-1'$"):
        open_collection(path)
    path = write("s.json", squad(("T", [("one", [("a", None)])])))
    with pytest.raises(
        DataError, match=r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: the field question is missing or not text$"
    ):
        open_collection(path)
    paragraphs = [{"context": "one", "qas": None}, {"context": "two", "qas": 5}]
    path = write("s.json", json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    with pytest.raises(DataError, match=r"data\[0\]\.paragraphs\[1\]: the field qas is not a list$"):
        open_collection(path)


def test_real_beir_and_squad(shared: Path) -> None:
    collection = opened(shared / "data" / "scifact")
    sizes = {name: (len(collection.queries(name)), len(collection.qrels(name))) for name in collection.splits}
    assert sizes == {"dev": (154, 173), "test": (300, 339), "train": (655, 746), "train-all": (809, 919)}
    assert not {query.id for query in collection.queries("dev")} & {query.id for query in collection.queries("train")}
    for language in ("en", "zh"):
        squad = opened(shared / "data" / "xquad" / f"xquad.{language}.json")
        assert (len(squad.queries("test")), len(squad.qrels("test"))) == (1190, 1190)
        assert {qrel.document_id for qrel in squad.qrels("test")} == {document.id for document in squad.documents()}


def test_real_pairs_split_by_focus(shared: Path) -> None:
    path = shared / "data" / "medquad" / "pairs.jsonl.gz"
    collection = opened(path)
    assert {name: len(collection.queries(name)) for name in collection.splits} == {
        "train": 11047,
        "dev": 1402,
        "test": 1551,
    }
    documents = {document.id: document for document in collection.documents()}
    own = {name: {query.id.removeprefix("q-") for query in collection.queries(name)} for name in collection.splits}
    focus = {name: {normalise(documents[key].metadata["focus"]) for key in keys} for name, keys in own.items()}
    assert not focus["train"] & focus["dev"]
    assert not focus["train"] & focus["test"]
    assert not focus["dev"] & focus["test"]
    same_text = defaultdict(set)
    for document in documents.values():
        same_text[normalise(document.text)].add(document.id)
    held_out = {
        normalise(documents[qrel.document_id].text) for name in ("dev", "test") for qrel in collection.qrels(name)
    }
    assert not held_out & {normalise(documents[qrel.document_id].text) for qrel in collection.qrels("train")}
    judged = defaultdict(set)
    for qrel in collection.qrels("test"):
        judged[qrel.query_id].add(qrel.document_id)
    assert judged.keys() == {query.id for query in collection.queries("test")}
    for query_id, relevant in judged.items():
        assert query_id.removeprefix("q-") in relevant
        assert all(same_text[normalise(documents[key].text)] <= relevant for key in relevant)
