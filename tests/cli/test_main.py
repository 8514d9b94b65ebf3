"""What a command prints, where, and with which exit code. Jobs are replaced, so that nothing heavy runs."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llara.cli
from llara import __version__
from llara.cli import main
from llara.cli.table import COMMANDS
from llara.errors import ConfigError, DataError
from llara.progress import note, set_quiet

RUN = "import sys; from llara.cli import main; sys.exit(main(sys.argv[1:]))"
INDEX = ["index", "--vectors", "v", "--output", "my index"]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara.invocation._program", lambda: ["llara"])


@dataclass(frozen=True)
class Result:
    documents: int = 5183
    folder: Path = Path("i")
    seconds: float = 1.23456
    share: float = float("nan")
    names: tuple[str, ...] = ("a", "b")
    nothing: None = None


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets quietness and environment for a whole process; a test gives them back."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
    yield
    set_quiet(False)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    def replace(function: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(llara.cli, "_job", lambda path: function)

    return replace


def raises(error: BaseException) -> Callable[[Any], Any]:
    def fail(config: Any) -> Any:
        raise error

    return fail


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"llara {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands_in_the_order_of_the_job(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    positions = [out.index(f"\n  {command.name} ") for command in COMMANDS]
    assert positions == sorted(positions)
    assert [command.name for command in COMMANDS] == [
        "demo", "plan adapt", "plan encode", "plan index", "adapt", "finetune", "encode", "index", "search",
        "rerank", "fuse", "mine", "evaluate", "explain", "convert", "verify", "doctor",
    ]  # fmt: skip


def test_help_of_a_first_word_lists_the_commands_that_begin_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("  plan ")] == [
        ["plan", "adapt"], ["plan", "encode"], ["plan", "index"],
    ]  # fmt: skip


def test_a_command_s_help_shows_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--help"]) == 0
    out = capsys.readouterr().out
    assert "llara adapt --model BASE --corpus PATH... --output DIR" in out
    for text in (
        "--chunk-length INT",
        "Tokens of text per chunk",
        "[default: 128]",
        "[required]",
        "--json",
        "--offline",
    ):
        assert text in out


def test_the_result_goes_to_stdout_and_the_next_command_to_stderr(
    job: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    job(lambda config: Result())
    assert main(INDEX) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "documents  5,183",
        "folder     i",
        "seconds    1.235",
        "share      nan",
        "names      a, b",
    ]
    assert err == "next: llara search 'YOUR QUESTION' --index 'my index'\n"


def test_json_is_one_object(job: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    job(lambda config: Result())
    assert main([*INDEX, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "documents": 5183, "folder": "i", "seconds": 1.23456, "share": None, "names": ["a", "b"], "nothing": None,
    }  # fmt: skip
    assert err == ""


def test_what_a_library_prints_is_no_part_of_the_result(
    job: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(config: Any) -> Result:
        print("* Trackio project initialized")
        return Result()

    job(chatty)
    assert main([*INDEX, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["documents"] == 5183
    assert err == "* Trackio project initialized\n"


def test_quiet_reaches_the_job_s_notes(job: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(config: Any) -> Result:
        note("working")
        return Result()

    job(chatty)
    assert main(INDEX) == 0
    assert "working" in capsys.readouterr().err
    assert main([*INDEX, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_offline_is_set_before_the_job_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def load(path: str) -> Callable[[Any], Any]:
        seen.extend(os.environ[name] for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        return lambda config: Result()

    monkeypatch.setattr(llara.cli, "_job", load)
    assert main([*INDEX, "--offline", "--quiet"]) == 0
    assert seen == ["1", "1"]


def test_print_config_prints_what_config_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "why", "--index", "i", "--top-k", "3", "--print-config"]) == 0
    first = capsys.readouterr()
    assert first.err == "" and 'query = "why"' in first.out
    file = tmp_path / "job.toml"
    file.write_text(first.out, encoding="utf-8")
    assert main(["search", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().out == first.out


def test_a_mistake_is_one_line_and_exit_code_2(job: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    job(raises(DataError("corpus.jsonl", 7, "is no JSON")))
    assert main(INDEX) == 2
    assert capsys.readouterr() == ("", "error: corpus.jsonl:7: is no JSON\n")


def test_several_faults_are_one_line_each(job: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    job(raises(ConfigError(["--a: is wrong", "--b: is wrong"])))
    assert main(INDEX) == 2
    assert capsys.readouterr().err == "error: --a: is wrong\nerror: --b: is wrong\n"
    assert main(["search", "--indx", "i"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --indx: unknown flag (did you mean '--index'?)",
        "error: --index: is required",
        "error: --query, --queries or --interactive: give exactly one of the three",
    ]


def test_the_system_s_refusals_are_mistakes(job: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    job(raises(PermissionError(errno.EACCES, "Permission denied", "/locked/x")))
    assert main(INDEX) == 2
    assert capsys.readouterr().err == "error: /locked/x: Permission denied\n"


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x"), MemoryError()])
def test_a_fault_of_ours_keeps_its_traceback(
    error: Exception, job: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    job(raises(error))
    assert main(INDEX) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and type(error).__name__ in err
    assert err.splitlines()[-1].startswith("error: this is a fault of llara") and "llara doctor" in err


def test_ctrl_c_prints_what_resumes(job: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    job(raises(KeyboardInterrupt()))
    assert main([*INDEX, "--quiet"]) == 130
    assert capsys.readouterr().err == "\nstopped; to resume: llara index --vectors v --output 'my index' --quiet\n"


def test_a_reader_that_went_away_is_no_error() -> None:
    command = [sys.executable, "-c", RUN, "adapt", "--model", "m", "--corpus", *["c" * 200] * 2000, "--output", "o"]
    with subprocess.Popen([*command, "--print-config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).parent / "llara"
    result = subprocess.run([command, "adap"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: adap: unknown command (did you mean 'adapt'?); see llara --help\n"
