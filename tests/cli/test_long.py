"""Long documents through the command line: cut into passages, searched for documents, and resumed to the same bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.cli import main
from llara.data import read_run
from llara.encoding.shards import Vectors
from llara.retriever import Retriever
from tests import tiny
from tests.reference.ranking import best_of_passages

Run = Callable[..., tuple[int, str, str]]
TOPICS = ("The sky is blue.", "Read a file line by line.", "Vectors are numbers.", "Why is the model blue?")
LONG = {"--long": "cut", "--overlap": 3, "--passage-length": 48, "--shard-size": 4}


def rows() -> list[dict[str, Any]]:
    found = []
    for number in range(10):
        parts = [f"{TOPICS[(number * at) % 4]} It is {number}, {at}." for at in range(1 + 3 * (number % 4))]
        found.append({"_id": f"d{number}", "title": f"Of {number}", "text": " ".join(parts), "even": number % 2 == 0})
    found[4]["text"] += f" {TOPICS[3]} The needle is here, in the last sentence of all."
    return found


def flags(settings: dict[str, Any]) -> list[str]:
    return [str(word) for pair in settings.items() for word in pair]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "queries.tsv").write_text("q1\tthe needle is here\nq2\twhy is the sky blue\n")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td4\t1\nq2\td1\t1\n")
    tiny.model("llama").save(folder / "model")
    encode = ["encode", "--model", folder / "model", "--corpus", folder / "corpus.jsonl", "--quiet"]
    index = ["index", "--vectors", folder / "vectors", "--quiet"]
    for command in (
        [*encode, *flags(LONG), "--sparse", "--expansion", "--output", folder / "vectors"],
        [*encode, "--passage-length", 48, "--output", folder / "truncated"],
        [*index, "--output", folder / "flat"],
        [*index, "--output", folder / "sparse", "--type", "sparse"],
        [*index, "--output", folder / "bm25", "--type", "bm25"],
    ):
        assert main([str(word) for word in command]) == 0
    return folder


def test_a_run_holds_each_document_once_by_its_best_passage(run: Run, made: Path, tmp_path: Path) -> None:
    search = ["search", "--queries", made / "queries.tsv", "--index", made / "flat", "--output", tmp_path / "run"]
    assert run(*search)[0] == 0
    vectors = Vectors.open(made / "vectors")
    stored, table = np.concatenate(list(vectors.shards())), np.concatenate(list(vectors.passages()))
    assert len(stored) > 2 * len(vectors)
    queries = Retriever.load(str(made / "model")).encode_queries(["the needle is here", "why is the sky blue"])
    for query, hits in zip(queries, read_run(tmp_path / "run").values(), strict=True):
        scores = (stored.astype(np.float64) @ query).astype(np.float32).tolist()
        wanted = best_of_passages(scores, table[:, 0].tolist(), vectors.documents.ids())
        assert [hit.document_id for hit in hits] == [vectors.documents.id(at) for at, _ in wanted]
        assert [hit.score for hit in hits] == pytest.approx([score for _, score in wanted])
    run(*search[:-1], tmp_path / "two", "--top-k", 2)
    assert [len(hits) for hits in read_run(tmp_path / "two").values()] == [2, 2]


def test_a_passage_has_the_vector_of_its_text(made: Path) -> None:
    vectors, retriever = Vectors.open(made / "vectors"), Retriever.load(str(made / "model"))
    documents = [vectors.documents.get(at) for at in range(len(vectors))]
    table = np.concatenate(list(vectors.passages())).tolist()
    texts = [documents[at].text[start:stop] for at, start, stop in table]
    again = retriever.encode_passages(texts, [documents[at].title for at, _, _ in table], max_length=48)
    assert np.abs(np.concatenate(list(vectors.shards())) - again).max() < 1e-5
    truncated = np.concatenate(list(Vectors.open(made / "truncated").shards()))
    whole = [row for row, (at, start, stop) in enumerate(table) if stop - start == len(documents[at].text)]
    assert len(whole) > 1  # what fits has the vector that it has without being cut
    assert np.abs(again[whole] - truncated[[table[row][0] for row in whole]]).max() < 1e-5


def test_what_is_shown_is_of_the_best_passage(run: Run, made: Path) -> None:
    for kind in (["flat"], ["sparse"], ["bm25", "--hybrid", str(made / "flat")]):
        index = ["--index", made / kind[0], *kind[1:]]
        code, out, _ = run("search", "the needle is here, in the last sentence", *index, "--json", "--top-k", 10)
        answers = {each["id"]: each for each in json.loads(out)["answers"]}
        assert code == 0 and len(answers) >= 1
        lengths = {row["_id"]: len(row["text"]) for row in rows()}
        assert all(len(each["text"]) < 150 for each in answers.values() if lengths[each["id"]] > 300)


def test_with_filters_and_other_indexes(run: Run, made: Path) -> None:
    hybrid = ["--index", made / "flat", "--hybrid", made / "sparse", made / "bm25"]
    code, out, _ = run("search", "why is the sky blue", *hybrid, "--filter", "even=true", "--json")
    found = json.loads(out)
    assert code == 0 and found["matching"] == 5
    ids = [each["id"] for each in found["answers"]]
    assert len(ids) == len(set(ids)) == 5 and {int(each[1:]) % 2 for each in ids} == {0}


def test_a_stopped_run_goes_on_to_the_same_bytes(run: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "vectors", tmp_path / "vectors")
    (tmp_path / "vectors" / "shard-00001.json").unlink()
    (tmp_path / "vectors" / "shard-00001.passages.npy").unlink()
    encode = ["encode", "--model", made / "model", "--corpus", made / "corpus.jsonl", "--sparse", "--expansion"]
    code, out, _ = run(*encode, *flags(LONG), "--output", tmp_path / "vectors", "--json")
    assert code == 0 and json.loads(out)["reused_shards"] == 2
    # The manifest and config.toml hold paths, of the model and the output.
    for path in (made / "vectors").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "vectors" / path.name).read_bytes(), path.name


def test_several_processes_give_the_same_bytes(run: Run, made: Path, tmp_path: Path) -> None:
    encode = ["encode", "--model", made / "model", "--corpus", made / "corpus.jsonl", "--sparse", "--expansion"]
    code, _, err = run(*encode, *flags(LONG), "--output", tmp_path / "vectors", "--workers", 2, "--worker-threads", 1)
    assert code == 0, err
    for path in (made / "vectors").glob("shard-*"):
        assert path.read_bytes() == (tmp_path / "vectors" / path.name).read_bytes(), path.name


def test_another_way_with_long_documents_is_another_folder(run: Run, made: Path) -> None:
    encode = ["encode", "--model", made / "model", "--corpus", made / "corpus.jsonl", "--output", made / "vectors"]
    common = ["--passage-length", 48, "--shard-size", 4, "--sparse", "--expansion"]
    code, _, err = run(*encode, *common)
    assert code == 2 and "cut" in err
    code, _, err = run(*encode, *common, "--long", "cut", "--overlap", 4)
    assert code == 2 and "overlap" in err


def test_settings_that_do_not_fit(run: Run, made: Path, tmp_path: Path) -> None:
    encode = ["encode", "--model", made / "model", "--corpus", made / "corpus.jsonl", "--output", tmp_path / "v"]
    code, _, err = run(*encode, "--overlap", 5)
    assert code == 2 and "error: --overlap: goes with --long cut" in err
    code, _, err = run(*encode, "--long", "cut", "--passage-length", 48, "--overlap", 40)
    assert code == 2 and "error: --overlap: at most a quarter of a passage's" in err
    assert not (tmp_path / "v").exists()
    code, _, err = run("index", "--vectors", made / "vectors", "--type", "milvus", "--output", tmp_path / "m")
    assert code == 2 and "holds several passages of a document, --type milvus takes one" in err
    assert not (tmp_path / "m").exists()


def test_verify_and_plan_know_passages(run: Run, made: Path) -> None:
    code, out, _ = run("verify", made / "vectors", "--json")
    assert code == 0 and json.loads(out)["vectors"].startswith("1")  # so many were computed again
    assert run("verify", made / "flat")[0] == 0
    plan = ["plan", "encode", "--model", made / "model", "--corpus", made / "corpus.jsonl", "--calibrate", 0.01]
    code, out, _ = run(*plan, *flags(LONG), "--json")
    amounts = json.loads(out)["amounts"]
    assert code == 0 and amounts["documents"] == 10
    assert amounts["passages"] == Vectors.open(made / "vectors").count_rows()
    code, out, _ = run("plan", "index", "--vectors", made / "vectors", "--json")
    assert code == 0 and json.loads(out)["disk"]["vectors"] == 4 * 32 * Vectors.open(made / "vectors").count_rows()


def test_negatives_are_mined_from_passages(run: Run, made: Path, tmp_path: Path) -> None:
    mine = ["mine", "--index", made / "flat", "--queries", made / "queries.tsv", "--qrels", made / "qrels.tsv"]
    code, _, err = run(*mine, "--from-rank", 1, "--negatives", 3, "--output", tmp_path / "mined.jsonl")
    assert code == 0 and "the index holds passages; a negative is the whole document" in err
    found = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    texts = {row["text"] for row in rows()}
    assert [len(each["neg"]) for each in found] == [3, 3]
    assert all(passage["text"] in texts for each in found for passage in each["neg"])
