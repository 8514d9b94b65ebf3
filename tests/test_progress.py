"""Progress lines off and on a terminal."""

import os
import pty
import re
import subprocess
import sys

import pytest

from llara import progress
from llara.progress import Progress, note, set_quiet


class Clock:
    """Stands in for time.monotonic, so that no test waits or depends on speed."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_on_terminal", lambda: False)
    return clock


def run(clock: Clock, steps: int, seconds: float, start: int = 0, total: int | None = 1200) -> None:
    with Progress("encode", total, "passages") as bar:
        if start:
            bar.start_at(start)
        for _ in range(steps):
            clock.now += seconds
            bar.advance(100)


def test_short_work_prints_only_its_closing_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 12, 0.1)
    assert capsys.readouterr() == ("", "encode: 1,200 passages, 1,000/s, 0:01 in all\n")


def test_long_work_prints_after_two_seconds_and_then_every_ten(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 12, 2)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 100/1,200 passages, 50/s, 0:22 left",
        "encode: 600/1,200 passages, 50/s, 0:12 left",
        "encode: 1,100/1,200 passages, 50/s, 0:02 left",
        "encode: 1,200 passages, 50/s, 0:24 in all",
    ]


def test_work_found_done_is_not_part_of_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 2, 2, start=1000)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 1,100/1,200 passages, 50/s, 0:02 left",
        "encode: 1,200 passages, 200 of them now, 50/s, 0:04 in all",
    ]


def test_nothing_left_to_do_says_so(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 0, 0, start=1200)
    assert capsys.readouterr().err == "encode: 1,200 passages, all done before\n"


def test_an_unknown_total_shows_no_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 1, 4, total=None)
    assert "encode: 100 passages, 25/s\n" in capsys.readouterr().err


def test_fields_are_shown_behind(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("adapt", 10, "steps") as bar:
        clock.now += 4
        bar.advance(1, loss=1.23456, phase="warm-up")
    assert capsys.readouterr().err.splitlines()[0] == "adapt: 1/10 steps, 0.25/s, 0:36 left, loss 1.235, phase warm-up"


def test_an_error_inside_says_where_it_stopped(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Progress("encode", 10, "passages") as bar:
        clock.now += 1
        bar.advance(4)
        raise KeyError
    assert capsys.readouterr().err == "encode: stopped at 4/10 passages, 4/s, 0:01 in all\n"


def test_quiet_silences_progress_and_notes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    set_quiet(True)
    try:
        run(clock, 12, 2)
        note("hello")
    finally:
        set_quiet(False)
    assert capsys.readouterr() == ("", "")


def test_durations() -> None:
    assert [progress._duration(s) for s in (0, 59.6, 61, 3600, 36_061)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]


SCRIPT = """
import sys
from llara.progress import Progress, note
assert "rich" not in sys.modules
with Progress("outer", 2, "stages") as outer, Progress("[b]inner[/b]", 3, "rows") as bar:
    bar.advance(3, loss=0.5)
    note("a note")
assert ("rich" in sys.modules) == sys.stderr.isatty(), sys.stderr.isatty()
"""


def test_on_a_terminal_rich_draws_without_colour_where_that_is_asked() -> None:
    control, terminal = pty.openpty()
    env = {**os.environ, "NO_COLOR": "1", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=terminal, env=env) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                block = os.read(control, 4096)
            except OSError:  # Linux reports the end of a terminal as EIO
                break
            if not block:
                break
            shown += block
    os.close(control)
    assert process.returncode == 0, shown.decode()
    assert b"a note" in shown
    assert b"[b]inner[/b]: 3 rows" in shown
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", shown), "colour in spite of NO_COLOR"


def test_off_a_terminal_rich_is_not_imported() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0] == "a note"
