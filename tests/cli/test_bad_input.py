"""What a user sees on plain mistakes: one `error:` line that names file, line and remedy, exit code 2, no traceback."""

import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llara.hub import MINI
from tests import tiny, tiny_reranker

Run = Callable[..., tuple[int, str, str]]


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


PAIR = {"query": "why", "pos": ["a passage"], "neg": ["another"]}
RUN = ("q1 Q0 d1 1 2.5 x", "q1 Q0 d2 2 1.5 x")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a retriever, a reranker as a hub holds it, and an adapter of one."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_base(folder / "base")
    tiny.model().save(folder / "retriever")
    tiny_reranker.save_published(folder / "reranker")
    tiny_reranker.save_adapter(folder / "adapter", folder / "base")
    return folder


@pytest.fixture
def finetune(run: Run, models: Path, tmp_path: Path) -> Run:
    def run_finetune(*argv: object) -> tuple[int, str, str]:
        result = run("finetune", "--model", models / "base", "--output", tmp_path / "out", "--steps", "1", *argv)
        assert (result[0] == 0) == (tmp_path / "out").exists()
        return result

    return run_finetune


def only_error(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (2, "")
    (error,) = errors(err)
    return error


def test_a_training_set_that_teaches_nothing(finetune: Run, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", {"query": "why", "pos": ["a passage"]})
    error = only_error(finetune("--train", train))
    assert error.startswith(f"error: {train}: nothing can be learned: all examples have the same query")
    assert "llara mine" in error
    write(train, {"query": "why", "pos": ["a passage"]}, {"query": "how", "pos": ["another"]})
    assert "raise --batch-size" in only_error(finetune("--train", train, "--batch-size", "1"))
    assert finetune("--train", train)[0] == 0


def test_measuring_on_what_is_trained_on_is_said(finetune: Run, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", PAIR, {"query": "how", "pos": ["else"]})
    code, _, err = finetune("--train", train, "--dev", train)
    assert code == 0
    assert f"--dev: {train} is trained on, too, so the best step there need not be the best elsewhere" in err


def test_some_steps_that_teach_nothing_are_said(finetune: Run, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", PAIR, {"query": "how", "pos": ["else"]})
    code, _, err = finetune("--train", train, "--batch-size", "1")
    assert code == 0
    assert "1 examples have no hard negative, and a batch of one query teaches nothing then" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--split", "dev"), "--split: 'dev' would be the split of a collection, and"),
        (("--dev", "dev.jsonl", "--dev-split", "test"), "--dev-split: 'test' would be the split of a collection"),
        (("--dev", "none.jsonl"), "none.jsonl: no such file or folder"),
        (("--corpus", "none.jsonl"), "none.jsonl: no such file or folder"),
        (("--dev", "pipe"), "pipe: is no regular file but a pipe or a device"),
        (("--lora-alpha", "64"), "--lora-alpha: goes with --lora-rank"),
    ],
)
def test_what_flags_and_paths_alone_give_away(
    finetune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "dev.jsonl"):
        write(tmp_path / name, PAIR, PAIR)
    os.mkfifo(tmp_path / "pipe")
    assert only_error(finetune("--train", "train.jsonl", *argv)).startswith(f"error: {said}")
    assert not (tmp_path / "out.partial").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]}', "has pos_scores but no neg_scores"),
        ('{"query": "q", "pos": ["a"], "neg": ["b"], "neg_scores": [1]}', "has neg_scores but no pos_scores"),
        ('{"query": "q", "pos": ["a"], "pos_scores": [NaN]}', "broken JSON: NaN is not a JSON value"),
        ('{"query": "q", "pos": ["a"], "pos_scores": [1e999]}', "pos_scores[0] is not a finite float32 number"),
        ('{"query": "q", "pos": ["a"], "pos_scores": ["1"]}', "pos_scores[0] is not a number but a string"),
        ('{"query": "q", "pos": ["a"], "pos_scores": [true]}', "pos_scores[0] is not a number but true or false"),
        ('{"query": "q", "pos": ["a"], "pos_scores": "1"}', "the field pos_scores must be a list of numbers"),
        ('{"query": "q", "pos": ["a"], "negs": ["b"]}', "no field neg, but 'negs'; rename it"),
        ("{", "broken JSON: Expecting property name enclosed in double quotes at column 2; each line must hold a"),
    ],
)
def test_training_rows_are_checked_before_the_first_step(finetune: Run, tmp_path: Path, line: str, said: str) -> None:
    train = write(tmp_path / "train.jsonl", PAIR, line)
    assert only_error(finetune("--train", train)).startswith(f"error: {train}:2: {said}")
    assert not (tmp_path / "out.partial" / "log.jsonl").exists()


def test_an_output_that_cannot_be_made(
    finetune: Run, run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write(tmp_path / "train.jsonl", PAIR, PAIR)
    below = tmp_path / "train.jsonl" / "deep" / "out"
    hits = write(tmp_path / "run", *RUN)
    refused = f"error: {below}: cannot be made, {train} is no folder; choose another --output"
    config = write(tmp_path / "settings.toml", f"train = '{train}'")
    assert only_error(run("finetune", "--model", "mini", "--config", config, "--output", below)) == refused
    assert only_error(run("fuse", "--run", hits, hits, "--output", below)) == refused
    qrels = write(tmp_path / "qrels", "q1 0 d1 1")
    assert only_error(run("evaluate", "--run", hits, "--qrels", qrels, "--output", below)) == refused
    for command in (("encode", "--model", "mini"), ("index", "--type", "bm25")):
        assert only_error(run(*command, "--corpus", corpus, "--output", below)) == refused
    assert "exists and was not made by" in only_error(
        run("finetune", "--model", "mini", "--config", config, "--output", "/")
    )
    assert "is a folder" in only_error(run("fuse", "--run", hits, hits, "--output", ""))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may write anywhere
    assert "cannot be written into; choose another" in only_error(finetune("--train", train))


def test_a_chunk_that_cannot_be_long_enough(run: Run, tmp_path: Path, corpus: Path) -> None:
    command = ("adapt", "--model", "mini", "--corpus", corpus, "--output", tmp_path / "out")
    error = only_error(run(*command, "--min-chunk-length", "200"))
    assert error.startswith("error: --min-chunk-length: 200 is more than --chunk-length 128")


def test_models_of_the_wrong_kind(run: Run, models: Path, tmp_path: Path, corpus: Path) -> None:
    hits, queries = write(tmp_path / "run", *RUN), write(tmp_path / "queries.jsonl", {"_id": "q1", "text": "why"})
    train, out = write(tmp_path / "train.jsonl", PAIR, PAIR), ("--output", tmp_path / "out")

    def rerank(model: str) -> str:
        texts = ("--run", hits, "--queries", queries, "--corpus", corpus)
        return only_error(run("rerank", "--model", models / model, *texts, *out))

    assert "retriever: is a retriever, which makes vectors" in rerank("retriever")
    assert "has no score head, so it is no reranker; make one with: llara finetune --task rerank" in rerank("base")
    for command in (("encode", "--corpus", corpus), ("adapt", "--corpus", corpus), ("finetune", "--train", train)):
        for model, said in (
            ("reranker", "is a reranker, which scores"),
            ("adapter", "is a reranker, which scores"),
        ):
            assert said in only_error(run(*command, "--model", models / model, *out))
    assert not (tmp_path / "out").exists()
