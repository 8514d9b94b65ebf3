"""What a user sees on plain mistakes: one `error:` line that names file, line and remedy, exit code 2, no traceback."""

import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llara.cli import main
from llara.loading import MINI

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_main(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_main


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"_id": f"d{n}", "title": "", "text": f"passage number {n} speaks of rivers and stones"} for n in range(6)]
    return write(tmp_path / "corpus.jsonl", *rows)


def test_missing_file(run: Run, tmp_path: Path) -> None:
    code, out, err = run("index", "--type", "bm25", "--corpus", tmp_path / "none.jsonl", "--output", tmp_path / "i")
    assert (code, out) == (2, "")
    assert len(errors(err)) == 1
    assert "none.jsonl: " in err


@pytest.mark.parametrize("command", ["adapt", "encode"])
def test_empty_file(run: Run, tmp_path: Path, command: str) -> None:
    empty = write(tmp_path / "empty.jsonl")
    code, _, err = run(command, "--model", "mini", "--corpus", empty, "--output", tmp_path / "out")
    assert code == 2
    assert f"error: {empty}: " in err
    assert not (tmp_path / "out").exists()


def test_broken_json_stops_adapt_with_file_and_line(run: Run, tmp_path: Path) -> None:
    broken = write(tmp_path / "text.jsonl", {"_id": "a", "text": "fine"}, '{"_id": "b", "text": ')
    code, _, err = run("adapt", "--model", "mini", "--corpus", broken, "--output", tmp_path / "out")
    assert code == 2
    assert f"error: {broken}:2: " in err
    assert not (tmp_path / "out").exists()


def test_encode_skips_bad_rows_counts_and_lists_them(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [
        json.dumps({"_id": "good", "text": "a passage"}).encode(),
        b'{"_id": "broken", "text": ',
        json.dumps({"_id": "good", "text": "the same id"}).encode(),
        json.dumps({"_id": "empty", "text": "   "}).encode(),
        b'{"_id": "bytes", "text": "\xff\xfe"}',
        json.dumps({"text": "no id"}).encode(),
        json.dumps({"_id": "long", "text": "word " * 200_000}).encode(),
    ]
    path.write_bytes(b"\n".join(rows) + b"\n")
    code, out, err = run("encode", "--model", "mini", "--corpus", path, "--output", tmp_path / "vectors", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["documents"], result["rejected"]) == (2, 5)
    assert "rejected.jsonl" in err
    listed = [json.loads(line) for line in (tmp_path / "vectors" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [2, 3, 4, 5, 6]
    assert all(entry["file"] == str(path) for entry in listed)
    for entry, word in zip(listed, ["JSON", "duplicate", "empty", "UTF-8", "id"], strict=True):
        assert word in entry["reason"]


@pytest.mark.parametrize("job", [("encode", "--model", "mini"), ("index", "--type", "bm25")], ids=lambda job: job[0])
def test_a_corpus_of_bad_rows_alone(run: Run, tmp_path: Path, job: tuple[str, ...]) -> None:
    corpus = write(tmp_path / "corpus.jsonl", "{broken", {"_id": "a"})
    command = (*job, "--corpus", corpus, "--output", tmp_path / "out")
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    (error,) = errors(err)
    assert "rejected.jsonl: says why no row can be used, of 2; the first: " in error
    listed = next((tmp_path / "out").rglob("rejected.jsonl")).read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [1, 2]
    write(corpus, {"_id": "a", "text": "mended"})
    assert run(*command)[0] == 0


def test_a_bad_row_stops_adapt(run: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "text.jsonl", {"_id": "a", "text": "one"}, {"_id": "b", "text": 2})
    code, _, err = run("adapt", "--model", "mini", "--corpus", rows, "--output", tmp_path / "out")
    assert code == 2
    assert f"error: {rows}:2: the field text is not text but a number" in err


def test_training_row_without_a_positive(run: Run, tmp_path: Path) -> None:
    rows = write(tmp_path / "train.jsonl", {"query": "q", "pos": ["p"]}, {"query": "q", "pos": "a string"})
    code, _, err = run("finetune", "--model", "mini", "--train", rows, "--output", tmp_path / "out")
    assert code == 2
    assert f"error: {rows}:2: " in err
    assert "list" in err


def test_query_without_judgements_is_left_out_and_said(run: Run, tmp_path: Path) -> None:
    qrels = write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t1")
    hits = write(tmp_path / "run.trec", "q1 Q0 d1 1 2.5 x", "q2 Q0 d1 1 2.5 x")
    code, out, err = run("evaluate", "--run", hits, "--qrels", qrels, "--metrics", "RR@10", "--json")
    assert code == 0
    assert json.loads(out)["means"]["run"]["RR@10"] == 1.0
    assert "q2" in err


def test_runs_that_share_no_query_with_the_judgements(run: Run, tmp_path: Path) -> None:
    qrels = write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t1")
    hits = write(tmp_path / "run.trec", "other Q0 d1 1 2.5 x")
    code, out, err = run("evaluate", "--run", hits, "--qrels", qrels)
    assert (code, out) == (2, "")
    assert str(hits) in errors(err)[0]


def test_model_folder_without_tokenizer(run: Run, tmp_path: Path, corpus: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MINI / name, model / name)
    code, _, err = run("encode", "--model", model, "--corpus", corpus, "--output", tmp_path / "vectors")
    assert code == 2
    assert f"error: {model}: has no tokenizer" in err


def test_model_that_is_nowhere(run: Run, tmp_path: Path, corpus: Path) -> None:
    code, _, err = run(
        "encode", "--model", "some-org/some-model", "--corpus", corpus, "--output", tmp_path / "v", "--offline"
    )
    assert code == 2
    assert "hf download some-org/some-model" in errors(err)[0]


@pytest.mark.parametrize("command", ["adapt", "encode"])
def test_models_of_other_kinds(run: Run, tmp_path: Path, corpus: Path, command: str) -> None:
    def refusal(**settings: object) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(settings))
        code, out, err = run(command, "--model", folder, "--corpus", corpus, "--output", tmp_path / "out")
        assert (code, out) == (2, "")
        assert not (tmp_path / "out").exists()
        (error,) = errors(err)
        return error

    assert "model: is an encoder (bert), whose positions see what stands after them" in refusal(model_type="bert")
    reranker = refusal(model_type="llama", architectures=["LlamaForSequenceClassification"])
    assert "model: is a reranker, which scores a query with a document" in reranker
    assert "model: is an encoder (t5), whose positions see" in refusal(model_type="t5")
    assert "model: has no tokenizer" in refusal(model_type="llama")


def test_output_of_another_configuration(run: Run, tmp_path: Path, corpus: Path) -> None:
    vectors = tmp_path / "vectors"
    assert run("encode", "--model", "mini", "--corpus", corpus, "--output", vectors)[0] == 0
    code, _, err = run("encode", "--model", "mini", "--corpus", corpus, "--output", vectors, "--passage-length", "40")
    assert code == 2
    assert "passage_length was 160, is now 40" in err


def test_output_that_is_somebody_elses(run: Run, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "home").mkdir()
    mine = write(tmp_path / "home" / "letter.txt", "dear all")
    code, _, err = run("adapt", "--model", "mini", "--corpus", corpus, "--output", tmp_path / "home")
    assert code == 2
    assert f"error: {tmp_path / 'home'}: " in err
    assert mine.read_text() == "dear all\n"


def test_full_disk(run: Run, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", no_room)
        code, _, err = run("encode", "--model", "mini", "--corpus", corpus, "--output", tmp_path / "vectors")
    assert code == 2
    assert len(errors(err)) == 1
    assert "bytes" in err and str(tmp_path / "vectors") in err
    assert run("encode", "--model", "mini", "--corpus", corpus, "--output", tmp_path / "vectors")[0] == 0


def test_truncated_gzip(run: Run, tmp_path: Path, corpus: Path) -> None:
    cut = tmp_path / "corpus.jsonl.gz"
    cut.write_bytes(gzip.compress(corpus.read_bytes())[:-12])
    code, _, err = run("adapt", "--model", "mini", "--corpus", cut, "--output", tmp_path / "out")
    assert code == 2
    assert f"error: {cut}" in err


def test_unknown_flag_and_key_name_the_nearest(run: Run, tmp_path: Path) -> None:
    code, _, err = run("encode", "--modle", "mini", "--corpus", "x", "--output", "y")
    assert code == 2
    assert "--modle" in err and "--model" in err
    config = tmp_path / "encode.toml"
    config.write_text('model = "mini"\ntoken_buget = 5\n')
    code, _, err = run("encode", "--config", config, "--corpus", "x", "--output", "y")
    assert code == 2
    assert str(config) in err and "token_budget" in err


def test_a_template_that_leaves_no_room(run: Run, tmp_path: Path, corpus: Path) -> None:
    code, _, err = run(
        "encode", "--model", "mini", "--corpus", corpus, "--output", tmp_path / "v", "--passage-length", "4"
    )
    assert code == 2
    assert "leaves no room for text" in errors(err)[0]
