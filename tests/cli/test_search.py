"""`llara search` through the command line: filters, the interactive loop, and what a user gets wrong."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llara.cli import main
from llara.data import read_run
from tests import tiny

Run = Callable[..., tuple[int, str, str]]
LANGS = ("en", "de", "fr")
TOPICS = ("rivers and stones", "stars and planets", "bread and salt")


def rows() -> list[dict[str, Any]]:
    return [
        {
            "_id": f"d{n}",
            "title": f"Of {n}",
            "text": f"About {TOPICS[n % 2]}, {n}.",
            "year": 2000 + n,
            "lang": LANGS[n % 3],
        }
        for n in range(24)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, queries, a tiny model, and a flat, a sparse and a bm25 index over the same documents."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "queries.tsv").write_text("q1\trivers\nq2\tstars and planets\n")
    tiny.model("llama").save(folder / "model")
    vectors = ["--vectors", folder / "vectors"]
    encode = ["--model", folder / "model", "--corpus", folder / "corpus.jsonl", "--output", folder / "vectors"]
    for command in (
        ["encode", *encode, "--sparse", "--expansion", "--shard-size", "9"],
        ["index", *vectors, "--output", folder / "flat"],
        ["index", *vectors, "--output", folder / "sparse", "--type", "sparse"],
        ["index", *vectors, "--output", folder / "bm25", "--type", "bm25"],
    ):
        assert main([*map(str, command), "--quiet"]) == 0
    return folder


KINDS: Sequence[Sequence[str]] = (["flat"], ["sparse"], ["bm25"], ["flat", "--hybrid", "sparse", "bm25"])


def indexes(made: Path, kind: Sequence[str]) -> list[str]:
    return ["--index", *(each if each.startswith("--") else str(made / each) for each in kind)]


@pytest.mark.parametrize("kind", KINDS, ids="+".join)
def test_hits_are_the_best_of_the_documents_that_fit(run: Run, made: Path, kind: Sequence[str]) -> None:
    search = ["search", "rivers", *indexes(made, kind), "--json"]
    every = json.loads(run(*search, "--top-k", 24)[1])["answers"]
    fits = {row["_id"] for row in rows() if row["year"] >= 2006 and row["lang"] in ("en", "fr")}
    code, out, _ = run(*search, "--top-k", 3, "--filter", "year>=2006", "--filter", "lang in en,fr")
    found = json.loads(out)
    assert code == 0 and found["matching"] == len(fits) and found["filter"] == ["year>=2006", "lang in en,fr"]
    wanted = [each["id"] for each in every if each["id"] in fits][:3]
    if "--hybrid" not in kind:  # ranks among the documents that fit are fused, and not those among all
        assert [each["id"] for each in found["answers"]] == wanted
    assert {each["id"] for each in found["answers"]} <= fits and len(found["answers"]) == 3


@pytest.mark.parametrize("kind", KINDS, ids="+".join)
def test_a_run_holds_documents_that_fit(run: Run, made: Path, tmp_path: Path, kind: Sequence[str]) -> None:
    search = ["search", "--queries", made / "queries.tsv", *indexes(made, kind)]
    assert run(*search, "--output", tmp_path / "all.trec")[0] == 0
    code, out, _ = run(*search, "--output", tmp_path / "some.trec", "--filter", "lang=de", "--top-k", 5)
    assert code == 0 and "matching      8" in out
    for query, hits in read_run(tmp_path / "some.trec").items():
        assert hits and {LANGS[int(hit.document_id[1:]) % 3] for hit in hits} == {"de"}
        if "--hybrid" not in kind:
            wanted = [hit.document_id for hit in read_run(tmp_path / "all.trec")[query]]
            wanted = [each for each in wanted if LANGS[int(each[1:]) % 3] == "de"]
            assert [hit.document_id for hit in hits] == wanted[:5]


def test_a_filter_that_fits_nothing_has_no_hits(run: Run, made: Path) -> None:
    code, out, _ = run("search", "rivers", "--index", made / "flat", "--filter", "year>3000")
    assert (code, out) == (0, "no hits\n")


def test_bad_filters_are_named_before_anything_is_opened(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara.search.Indexes", lambda *_: pytest.fail("an index was opened"))
    code, out, err = run("search", "rivers", "--index", made / "flat", "--filter", "year>=", "lang")
    assert (code, out) == (2, "")
    assert err.count("error: --filter: ") == 2 and "'year>=': has no value" in err and "'lang': is no condition" in err


def test_a_field_that_no_document_has(run: Run, made: Path) -> None:
    code, out, err = run("search", "rivers", "--index", made / "bm25", "--filter", "yaer>=2000")
    assert (code, out) == (2, "")
    assert "error: --filter: 'yaer>=2000': no document has a field 'yaer' (did you mean 'year'?)" in err


def test_a_filter_needs_the_documents(run: Run, made: Path) -> None:
    (made / "vectors").rename(made / "moved")
    try:
        code, _, err = run("search", "rivers", "--index", made / "bm25", "--filter", "year>=2000")
    finally:
        (made / "moved").rename(made / "vectors")
    assert code == 2 and "vectors: holds no manifest.json" in err


# Line by line --------------------------------------------------------------------------------------------------------


@pytest.fixture
def type_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs an interactive search with these bytes as its standard input."""

    def run_with(lines: bytes, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return run("search", "--interactive", *argv)

    return run_with


@pytest.mark.parametrize("kind", KINDS, ids="+".join)
def test_each_line_gives_what_a_search_of_its_own_gives(
    run: Run, type_in: Run, made: Path, kind: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = ["rivers and stones", "stars", "bread"]
    single = [json.loads(run("search", query, *indexes(made, kind), "--json")[1])["answers"] for query in queries]
    opened = []
    from llara.ranking import Indexes

    plain = Indexes.__init__
    monkeypatch.setattr(Indexes, "__init__", lambda *given: opened.append(given) or plain(*given))
    code, out, err = type_in("\n".join(queries).encode(), *indexes(made, kind), "--json")
    replies = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and "query>" not in out + err  # a prompt is for people
    assert [reply["query"] for reply in replies] == queries
    assert [reply["answers"] for reply in replies] == single
    assert len(opened) == 1 and all(reply["seconds"] >= 0 for reply in replies)


def test_no_line_ends_the_loop_but_the_last(type_in: Run, made: Path) -> None:
    lines = [
        b"",
        b"  ",
        b"\xff\xfe",
        b"\x00\x07",
        b":k 0",
        b":k many",
        b":nonsense",
        b":filter year>=",
        b":filter yaer=1",
    ]
    code, out, _ = type_in(b"\n".join([*lines, b"rivers"]) + b"\n", "--index", made / "flat", "--json")
    replies = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(replies) == len(lines) + 1
    errors = [reply.get("error", "") for reply in replies]
    assert [each.partition(":")[0] for each in errors[:3]] == ["the line is empty"] * 2 + ["the line is not UTF-8"]
    assert errors[4] == ":k: must be a whole number above 0, got '0'"
    assert "unknown command" in errors[6] and "there are :k, :filter, :help" in errors[6]
    assert "has no value" in errors[7] and "did you mean 'year'?" in errors[8]
    assert len(replies[-1]["answers"]) == 10


def test_commands_hold_until_they_are_changed(type_in: Run, made: Path) -> None:
    lines = [":k 3", ":filter year>=2006", ":filter lang=de", "rivers", ":filter", "rivers", "::rivers", ":help"]
    code, out, _ = type_in("\n".join(lines).encode(), "--index", made / "bm25", "--json", "--filter", "lang in de,en")
    replies = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert replies[0] == {"command": ":k 3", "top_k": 3, "filter": ["lang in de,en"]}
    assert replies[2]["filter"] == ["lang in de,en", "year>=2006", "lang=de"]
    assert {(int(each["id"][1:]) % 3, int(each["id"][1:]) >= 6) for each in replies[3]["answers"]} == {(1, True)}
    assert replies[4]["filter"] == [] and len(replies[5]["answers"]) == 3
    assert replies[6]["query"] == ":rivers" and replies[6]["answers"] == replies[5]["answers"]
    assert replies[7]["command"] == ":help"


def test_people_read_hits_and_messages(type_in: Run, made: Path) -> None:
    code, out, err = type_in(b"rivers\n\n:k 1\nrivers\n:help\n", "--index", made / "bm25")
    assert code == 0 and "error: the line is empty" in err
    first, *others, last = out.split("\n\n")[:-1]
    assert first.startswith("  1   ") and "About rivers and stones" in first
    assert others[0] == "hits: 1, filter: none" and others[1].count("About rivers") == 1
    assert ":filter year>=2020" in last


def test_faults_of_the_start_are_errors(type_in: Run, made: Path) -> None:
    for argv, said in (
        (("--index", made / "nowhere"), "no such folder"),
        (("--index", made / "bm25", "--filter", "yaer=1"), "no document has a field 'yaer'"),
        (("rivers", "--index", made / "bm25"), "--query, --queries or --interactive: give exactly one of the three"),
        (("--index", made / "bm25", "--output", made / "run"), "--output: goes with --query or --queries"),
    ):
        code, out, err = type_in(b"rivers\n", *argv)
        assert (code, out) == (2, "") and said in err


def interactive(made: Path, stdin: int, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llara", "search", "--interactive", "--index", str(made / "bm25"), *more]
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_ends_it_cleanly_and_hits_come_at_once(made: Path) -> None:
    with interactive(made, subprocess.PIPE, "--json") as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b"rivers\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["query"] == "rivers"  # while the input is still open
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert b"Traceback" not in process.stderr.read()


def test_on_a_terminal_there_is_a_prompt(made: Path) -> None:
    outer, inner = pty.openpty()
    command = [sys.executable, "-m", "llara", "search", "--interactive", "--index", str(made / "bm25"), "--top-k", "1"]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True) as process:
        os.close(inner)
        shown = wait_for(outer, "query> ")
        assert ":help" in shown
        os.write(outer, b"rivers\n")
        assert "About rivers and stones" in wait_for(outer, "query> ")
        os.write(outer, b"\x04")  # Ctrl-D
        assert process.wait(20) == 0
    os.close(outer)


def wait_for(terminal: int, text: str, seconds: float = 60) -> str:
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, f"no {text!r} in {shown!r}"
        if select.select([terminal], [], [], 1)[0]:
            shown += os.read(terminal, 65536).decode()
    return shown


# What a user gets wrong ----------------------------------------------------------------------------------------------


def test_more_hits_than_documents_are_all(run: Run, made: Path) -> None:
    code, out, _ = run("search", "rivers", "--index", made / "flat", "--top-k", 1000, "--json")
    assert code == 0 and len(json.loads(out)["answers"]) == 24


@pytest.mark.parametrize(
    ("query", "said"), [("", "--query: is empty"), (" \t", "--query: is empty"), ("a\udcff", "--query: is not UTF-8")]
)
def test_a_query_that_says_nothing(run: Run, made: Path, query: str, said: str) -> None:
    code, out, err = run("search", query, "--index", made / "flat")
    assert (code, out) == (2, "") and f"error: {said}" in err


def test_vectors_of_another_model_or_dimension(run: Run, made: Path, tmp_path: Path) -> None:
    code, out, err = run("search", "rivers", "--index", made / "flat", "--model", "mini")
    assert (code, out) == (2, "")
    assert "mini: is not the model that the index was built with" in err and "dim was 32, is " in err


def test_ids_that_a_run_cannot_hold_and_ids_that_come_twice(run: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    bad = [{"_id": each, "text": "rivers"} for each in ("a\tb", "a\nb", "a b", "good", "good")]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in bad))
    code, _, err = run("index", "--type", "bm25", "--corpus", corpus, "--output", tmp_path / "index")
    assert code == 0 and "4 bad rows were left out" in err
    rejected = [json.loads(line) for line in (tmp_path / "index/documents/rejected.jsonl").read_text().splitlines()]
    assert [each["line"] for each in rejected] == [1, 2, 3, 5]
    assert all("white space or a control character" in each["reason"] for each in rejected[:3])
    assert "duplicate id" in rejected[3]["reason"]
    queries = tmp_path / "queries.jsonl"
    queries.write_text(json.dumps({"_id": "q\t1", "text": "rivers"}) + "\n")
    code, _, err = run("search", "--queries", queries, "--index", tmp_path / "index", "--output", tmp_path / "run")
    assert code == 2 and f"error: {queries}:1: " in err
    queries.write_text(2 * (json.dumps({"_id": "q1", "text": "rivers"}) + "\n"))
    code, _, err = run("search", "--queries", queries, "--index", tmp_path / "index", "--output", tmp_path / "run")
    assert code == 2 and f"error: {queries}:2: " in err
    queries.write_text(json.dumps({"_id": "q1", "text": " "}) + "\n")
    code, _, err = run("search", "--queries", queries, "--index", tmp_path / "index", "--output", tmp_path / "run")
    assert code == 2 and f"error: {queries}:1: " in err
