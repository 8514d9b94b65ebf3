"""The vectors folder: what goes in comes out, a rerun makes only what is missing, and what changed is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.data import parse_document, read_rows
from llara.encoding.documents import DocumentStore
from llara.encoding.shards import Vectors, verify_vectors, write_documents
from llara.errors import DataError, ModelError, StorageError
from llara.files import FolderLock
from llara.progress import Progress
from tests.encoding.helpers import DIM, IDENTITY, FakeEncoder, corpus_lines, run, tree, vector_of, write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", corpus_lines(35))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


def refusal(*arguments: Any, **changes: Any) -> str:
    with pytest.raises(StorageError) as caught:
        run(*arguments, **changes)
    return str(caught.value)


def rejected(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]


def test_what_goes_in_comes_out(corpus: Path, output: Path) -> None:
    assert run(corpus, output) == (4, 35, 0, 0)
    documents = [parse_document(row) for row in read_rows([corpus])]
    vectors = Vectors.open(output, verify=True)
    assert (len(vectors), vectors.dim) == (35, DIM)
    shards = list(vectors.shards())
    assert [shard.shape for shard in shards] == [(10, DIM)] * 3 + [(5, DIM)]
    assert not shards[0].flags.writeable
    np.testing.assert_array_equal(np.concatenate(shards), [vector_of(document) for document in documents])
    assert [vectors.ids(position) for position in range(35)] == [document.id for document in documents]
    assert list(vectors.documents.iter_documents()) == documents
    assert vectors.identity == {**IDENTITY, "dim": DIM, "vector_dtype": "float32", "shard_size": 10}
    assert vectors.manifest["rows"] == 35
    assert (output / "config.toml").read_text() == 'model = "mini"\n'


def test_numpy_and_plain_text_tools_read_the_files(corpus: Path, output: Path) -> None:
    run(corpus, output, vector_dtype="float16")
    vectors = np.load(output / "shard-00003.npy")
    assert (vectors.shape, vectors.dtype) == ((5, DIM), np.float16)
    assert (output / "shard-00003.ids").read_text().split() == [f"doc{n}" for n in range(30, 35)]
    assert np.load(output / "shard-00000.lookup.npy").shape == (2, 10)


def test_two_folders_of_one_corpus_are_equal_byte_by_byte(corpus: Path, output: Path, tmp_path: Path) -> None:
    run(corpus, output)
    run(corpus, tmp_path / "again")
    assert tree(output) == tree(tmp_path / "again")
    assert Vectors.open(output).fingerprint == Vectors.open(tmp_path / "again").fingerprint


def test_a_rerun_changes_nothing_and_encodes_nothing(corpus: Path, output: Path) -> None:
    run(corpus, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    encoder = FakeEncoder()
    assert run(corpus, output, encode=encoder, verify=True) == (4, 35, 0, 4)
    assert encoder.calls == []
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_rerun_may_differ_in_what_does_not_decide_the_vectors(corpus: Path, output: Path) -> None:
    run(corpus, output)
    fingerprint = Vectors.open(output).fingerprint
    run(corpus, output, about={"model_path": "elsewhere"}, extras={"config.toml": b"token_budget = 1\n"})
    vectors = Vectors.open(output, verify=True)
    assert vectors.manifest["about"] == {"model_path": "elsewhere"}
    assert (output / "config.toml").read_bytes() == b"token_budget = 1\n"
    assert vectors.fingerprint == fingerprint


def test_another_identity_is_refused_with_what_differs(corpus: Path, output: Path) -> None:
    run(corpus, output)
    before = tree(output)
    changed = {"identity": {**IDENTITY, "template": "release"}, "vector_dtype": "float16", "shard_size": 7}
    message = refusal(corpus, output, **changed)
    assert 'template was "paper", is now "release"' in message
    assert 'vector_dtype was "float32", is now "float16"' in message
    assert "shard_size was 10, is now 7" in message
    assert "model_fingerprint" not in message
    assert tree(output) == before
    with pytest.raises(StorageError, match="holds vectors, not documents; choose another --output"):
        write_documents(output, read_rows([corpus]))


def test_a_folder_of_someone_else_is_refused(corpus: Path, output: Path) -> None:
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    assert "is not empty and was not made by llara" in refusal(corpus, output)
    assert tree(output).keys() == {"thesis.tex"}


def test_a_corpus_that_grew_is_appended(corpus: Path, output: Path) -> None:
    run(corpus, output)
    before = tree(output)
    grown = corpus_lines(52)
    grown[40] = grown[33]
    write_corpus(corpus, grown)
    encoder = FakeEncoder()
    assert run(corpus, output, encode=encoder) == (6, 51, 1, 4)
    # The short shard stays as it is; new ones start behind it.
    assert [len(call) for call in encoder.calls] == [9, 7]
    after = tree(output)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json", "rejected.jsonl"}
    vectors = Vectors.open(output, verify=True)
    assert vectors.documents.ids() == [f"doc{n}" for n in range(52) if n != 40]
    assert rejected(output)[0]["reason"] == f"duplicate id (first at {corpus}:34)"


def test_a_corpus_that_changed_is_refused_where_it_changed(corpus: Path, output: Path) -> None:
    run(corpus, output)
    before = tree(output)
    rows = corpus_lines(35)
    rows[12] = rows[12].replace(b"Text", b"text", 1)
    write_corpus(corpus, rows)
    message = refusal(corpus, output)
    assert f"rows 11 to 20 ({corpus}:11 to {corpus}:20) are not those that shard-00001 was made from" in message
    assert "a corpus may only grow at its end" in message
    assert tree(output) == before


@pytest.mark.parametrize(("left", "said"), [(34, ":34) are not"), (30, "(no longer there)"), (3, "rows 1 to 10")])
def test_a_corpus_that_shrank_is_refused(corpus: Path, output: Path, left: int, said: str) -> None:
    run(corpus, output)
    write_corpus(corpus, corpus_lines(left))
    message = refusal(corpus, output)
    assert said in message
    assert "the corpus has changed since" in message


def test_a_corpus_that_shrank_before_a_gap_is_refused(corpus: Path, output: Path) -> None:
    run(corpus, output)
    (output / "shard-00002.json").unlink()
    write_corpus(corpus, corpus_lines(20))
    assert "it ends after 20 rows, and shard-00003.json holds later ones" in refusal(corpus, output)


def test_a_corpus_may_move(corpus: Path, output: Path) -> None:
    run(corpus, output)
    moved = corpus.rename(corpus.with_name("moved.jsonl"))
    assert run(moved, output).reused_shards == 4


def test_every_row_is_in_exactly_one_of_vectors_and_rejected(corpus: Path, output: Path) -> None:
    rows = corpus_lines(60)
    bad = {
        3: (b"{broken", "broken JSON"),
        9: (b"[1]", "not a JSON object"),
        10: (b"", "blank"),
        21: (b'{"_id": "x", "text": "\xff"}', "UTF-8"),
        22: (b'{"_id": "x", "text": "a\\u0000b"}', "NUL"),
        23: (b'{"text": "no id"}', "no id"),
        30: (b'{"_id": "e", "text": "  "}', "empty passage"),
        31: (b'{"_id": "a b", "text": "white space"}', "white space"),
        44: (rows[2], "duplicate id (first at"),
        45: (rows[43], f"duplicate id (first at {corpus}:44)"),
        59: (rows[2], f"duplicate id (first at {corpus}:3)"),
    }
    for number, (row, _) in bad.items():
        rows[number] = row
    write_corpus(corpus, rows)
    assert run(corpus, output) == (6, 49, 11, 0)
    listed = rejected(output)
    assert {entry["row"] - 1 for entry in listed} == set(bad)
    for entry in listed:
        assert entry["file"] == str(corpus)
        assert entry["line"] == entry["row"]
        assert bad[entry["row"] - 1][1] in entry["reason"]
    assert [entry["id"] for entry in listed if "id" in entry] == ["doc2", "doc43", "doc2"]
    vectors = Vectors.open(output, verify=True)
    assert vectors.documents.ids() == [f"doc{n}" for n in range(60) if n not in bad]
    assert sum(len(shard) for shard in vectors.shards()) == 49


def test_a_corpus_without_a_usable_row_is_refused_and_may_be_mended(output: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", [b"bad"] * 25)
    encoder = FakeEncoder()
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            run(corpus, output, encode=encoder)
        why = f"rejected.jsonl: says why no row can be used, of 25; the first: {corpus}:1: broken JSON"
        assert why in str(caught.value)
        assert [entry["line"] for entry in rejected(output)] == list(range(1, 26))
    assert encoder.calls == []
    with pytest.raises(StorageError, match="is not complete"):
        Vectors.open(output)
    write_corpus(corpus, [*corpus_lines(12), b"bad"])
    assert run(corpus, output, shard_size=5) == (3, 12, 1, 0), "also with other settings"
    assert [entry["line"] for entry in rejected(output)] == [13]
    assert len(Vectors.open(output, verify=True)) == 12
    assert not list(output.glob("shard-00003*"))


def test_rows_rejected_so_far_bind_nobody_and_one_document_does(output: Path, tmp_path: Path) -> None:
    """A run stopped after shards of bad rows alone has made nothing that a mended corpus could contradict."""

    def stop(_: Any) -> Any:
        raise KeyboardInterrupt

    corpus = write_corpus(tmp_path / "corpus.jsonl", [*[b"bad"] * 10, *corpus_lines(5)])
    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, encode=stop)
    assert (output / "shard-00000.json").exists()
    write_corpus(corpus, corpus_lines(15))
    assert run(corpus, output) == (2, 15, 0, 0)
    write_corpus(corpus, [b"bad", *corpus_lines(14)])
    assert "the corpus has changed since" in refusal(corpus, output)


def test_vectors_that_are_no_numbers_name_their_documents(corpus: Path, output: Path) -> None:
    def broken(documents: list[Any]) -> np.ndarray[Any, Any]:
        vectors = FakeEncoder()(documents)
        if documents[0].id == "doc10":
            vectors[3, 2], vectors[7, 0] = np.nan, np.inf
        return vectors

    with pytest.raises(ModelError, match="2 vectors hold NaN or infinity, of the documents doc13, doc17; nothing"):
        run(corpus, output, encode=broken)
    assert {name for name in tree(output) if name.startswith("shard-00001")} == set()
    with pytest.raises(StorageError, match="is not complete: run the same llara encode command again"):
        Vectors.open(output)
    assert run(corpus, output) == (4, 35, 0, 1)


def test_vectors_too_large_for_float16_are_not_stored_as_infinity(corpus: Path, output: Path) -> None:
    with pytest.raises(ModelError, match="--vector-dtype float32"):
        run(corpus, output, vector_dtype="float16", encode=lambda documents: FakeEncoder()(documents) * 1e6)


def test_a_corrected_command_may_follow_one_that_finished_nothing(corpus: Path, output: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--vector-dtype float32"):
        run(corpus, output, vector_dtype="float16", encode=lambda documents: FakeEncoder()(documents) * 1e6)
    (output / "shard-00000.npy").write_bytes(b"of a shard that was not finished")
    corrected = {"identity": {**IDENTITY, "passage_length": 99}, "extras": {"config.toml": b"corrected"}}
    assert run(corpus, output, **corrected) == (4, 35, 0, 0)
    run(corpus, tmp_path / "alone", **corrected)
    assert tree(output) == tree(tmp_path / "alone")


def test_one_finished_shard_binds_the_folder(corpus: Path, output: Path) -> None:
    def broken(documents: list[Any]) -> np.ndarray[Any, Any]:
        return FakeEncoder()(documents) * (np.nan if documents[0].id == "doc10" else 1)

    with pytest.raises(ModelError, match="nothing of this shard was kept"):
        run(corpus, output, encode=broken)
    before = tree(output)
    assert 'vector_dtype was "float32", is now "float16"' in refusal(corpus, output, vector_dtype="float16")
    assert tree(output) == before
    # Nor does a complete folder become free where somebody deleted its sidecars.
    run(corpus, output)
    for sidecar in output.glob("shard-*.json"):
        sidecar.unlink()
    assert 'vector_dtype was "float32", is now "float16"' in refusal(corpus, output, vector_dtype="float16")


def test_a_second_encoder_is_refused(corpus: Path, output: Path) -> None:
    with FolderLock(output):
        assert "is being written by process" in refusal(corpus, output)
    assert run(corpus, output).shards == 4


def test_of_two_encoders_at_once_one_wins(corpus: Path, output: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.encoding.rivals", str(corpus), str(output.parent)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert json.loads(result.stdout) == {"fault": "", "calls": "4"}, result.stderr
    run(corpus, tmp_path / "alone")
    assert tree(output) == tree(tmp_path / "alone")


def test_a_missing_sidecar_makes_that_shard_anew(corpus: Path, output: Path) -> None:
    run(corpus, output)
    before = tree(output)
    with (output / "shard-00001.npy").open("r+b") as file:
        file.truncate(100)
    assert "delete shard-00001.json and run the same command again" in refusal(corpus, output)
    (output / "shard-00001.json").unlink()
    encoder = FakeEncoder()
    assert run(corpus, output, encode=encoder) == (4, 35, 0, 3)
    assert [len(call) for call in encoder.calls] == [10]
    assert tree(output) == before


def test_files_of_a_shard_that_was_never_finished_go(corpus: Path, output: Path, tmp_path: Path) -> None:
    def dies_late(documents: list[Any]) -> np.ndarray[Any, Any]:
        if documents[0].id == "doc30":
            raise KeyboardInterrupt
        return FakeEncoder()(documents)

    with pytest.raises(KeyboardInterrupt):
        run(corpus, output, encode=dies_late)
    # What a kill inside the publication of the last shard leaves, of a corpus that then loses those rows.
    for name in ("shard-00003.npy", "shard-00003.ids", ".tmp-1-shard-00003.docs"):
        (output / name).write_bytes(b"rest")
    write_corpus(corpus, corpus_lines(30))
    assert run(corpus, output) == (3, 30, 0, 3)
    run(corpus, tmp_path / "undisturbed")
    assert tree(output) == tree(tmp_path / "undisturbed")


def test_a_text_of_one_megabyte(corpus: Path, output: Path) -> None:
    rows = corpus_lines(12)
    long = "wörter " * 150_000
    rows[7] = json.dumps({"_id": "long", "text": long}).encode()
    write_corpus(corpus, rows)
    run(corpus, output)
    store = Vectors.open(output, verify=True).documents
    assert len(long.encode()) > 1_000_000
    assert store.document("long").text == long
    assert store.get(6).id == "doc6"
    assert store.get(8).id == "doc8"


def test_documents_alone_follow_the_same_rules(corpus: Path, output: Path) -> None:
    assert write_documents(output, read_rows([corpus]), shard_size=10) == (4, 35, 0, 0)
    before = tree(output)
    assert not [name for name in before if name.endswith("0.npy")]
    assert write_documents(output, read_rows([corpus]), shard_size=10).reused_shards == 4
    assert tree(output) == before
    assert len(DocumentStore.open(output)) == 35
    assert verify_vectors(output) == []
    with pytest.raises(StorageError, match="holds documents, not vectors"):
        Vectors.open(output)


def test_progress_counts_rows_found_and_rejected(corpus: Path, output: Path) -> None:
    rows = corpus_lines(35)
    rows[4] = b"bad"
    write_corpus(corpus, rows[:20])
    with Progress("encode", 20, "passages") as progress:
        run(corpus, output, progress=progress)
        assert progress.done == 1, "the encoder counts the accepted ones"
    write_corpus(corpus, [*rows, b"bad"])
    with Progress("encode", 36, "passages") as progress:
        run(corpus, output, progress=progress)
        assert progress.done == 21


MEMORY = """
import resource, sys
from pathlib import Path
from tests.encoding.helpers import run
run(Path(sys.argv[1]), Path(sys.argv[2]), shard_size=500)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(corpus: Path, output: Path) -> int:
    """Returns the peak of a run in a process of its own, in KiB."""
    command = [sys.executable, "-c", MEMORY, str(corpus), str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small.jsonl", corpus_lines(2_000))
    large = write_corpus(tmp_path / "large.jsonl", corpus_lines(20_000))
    base = peak_memory(small, tmp_path / "small")
    assert peak_memory(large, tmp_path / "large") < base * 1.10
    # A run that finds everything done goes through all of it as well.
    assert peak_memory(large, tmp_path / "large") < base * 1.10
