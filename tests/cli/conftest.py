"""What tests of the command line share."""

from collections.abc import Callable

import pytest

from llara.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; gives its exit code, stdout and stderr, and refuses a traceback."""

    def run_main(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_main
