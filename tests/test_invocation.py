"""The lines that we print to be run next can be run: from an activated environment or not."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llara.invocation import shell_line


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working folder, and a PATH, without llara."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(folder: Path) -> Path:
    folder.mkdir(parents=True)
    path = folder / "llara"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_name_alone_where_the_shell_finds_it(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(script(nowhere / "bin").parent))
    monkeypatch.setattr(sys, "argv", ["other/llara"])
    assert shell_line(["search", "two words", "--top-k", 3]) == "llara search 'two words' --top-k 3"


def test_the_script_as_it_was_started(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(nowhere / "my env" / "bin")
    monkeypatch.setattr(sys, "argv", ["my env/bin/llara", "doctor"])
    assert shell_line(["demo"]) == "'my env/bin/llara' demo"


@pytest.mark.parametrize("started", ["-c", "/x/site-packages/llara/__main__.py", "gone/llara"])
def test_the_interpreter_otherwise(started: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    line = shell_line(["--version"])
    assert line == shlex.join([sys.executable, "-m", "llara", "--version"])
    answer = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("llara ")
