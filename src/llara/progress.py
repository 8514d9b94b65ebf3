"""Progress with rate and time left, and notes to the user; everything here goes to stderr.

On a terminal a bar is drawn by rich, which is imported only then. Elsewhere plain lines come at a calm pace, so that
a log file stays readable.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

FIRST_LINE_AFTER = 2.0  # seconds until the first plain line: short work stays silent until its closing line
LINE_EVERY = 10.0  # seconds between plain lines
DRAW_EVERY = 0.1  # seconds between updates of the bar: formatting must not cost more than the work

_quiet = False
_console: "Console | None" = None


def set_quiet(quiet: bool) -> None:
    """Switches progress and notes off or on, for the whole process."""
    global _quiet
    _quiet = quiet


@contextmanager
def hushed() -> Iterator[None]:
    """Keeps the block quiet: a job that is run to be measured has nothing to say."""
    before = _quiet
    set_quiet(True)
    try:
        yield
    finally:
        set_quiet(before)


def note(message: str) -> None:
    """Writes one line to stderr, unless the process is quiet."""
    if not _quiet:
        # While a bar is drawn, rich stands in for sys.stderr and puts the line above the bar.
        print(message, file=sys.stderr, flush=True)


class Progress:
    """Shows how far one piece of work is; a context manager.

    `label` names the work, `total` is the amount of it (None where nobody knows) and `unit` its plural name. The rate
    counts only work done in this run, not what `start_at` reports as found done.
    """

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._found = 0
        self._fields: dict[str, str | float] = {}
        self._began = self._shown = time.monotonic()
        self._pause = FIRST_LINE_AFTER
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        self._began = self._shown = time.monotonic()
        if not _quiet and _on_terminal():
            self._open_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        note(self._closing_line(finished=kind is None))

    def start_at(self, done: int) -> None:
        """Says that `done` units were found done already, by an earlier run."""
        self.done = self._found = done
        self._began = time.monotonic()
        if self._bar is not None:
            self._show(self._began)

    def skip(self, n: int) -> None:
        """Says that `n` more units were found done already, after some were done in this run."""
        self.done += n
        self._found += n
        if self.done == self._found:
            self._began = time.monotonic()
        if self._bar is not None:
            self._show(time.monotonic())

    def advance(self, n: int = 1, **fields: str | float) -> None:
        """Counts `n` more units as done; `fields`, such as `loss=1.23`, are shown behind the numbers."""
        self.done += n
        self._fields.update(fields)
        now = time.monotonic()
        if now - self._shown >= self._pause:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, status=self._status(now))
        else:
            self._pause = LINE_EVERY
            note(f"{self.label}: {self._status(now)}")

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        # The status text is ours, so that bar and plain line say the same; `transient` leaves only the closing line.
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24)
        # What a terminal has no room for in one line goes on in the next.
        wrapped = Column(ratio=1, no_wrap=False, overflow="fold")
        status = TextColumn("{task.fields[status]}", markup=False, table_column=wrapped)
        self._bar = RichProgress(*columns, status, console=_shared_console(), transient=True, expand=True)
        self._pause = DRAW_EVERY
        self._task = self._bar.add_task(self.label, total=self.total, status=self._status(self._began))
        self._bar.start()

    def _rate(self, now: float) -> float:
        """Units per second in this run; 0 while there is nothing to tell from."""
        seconds = now - self._began
        return (self.done - self._found) / seconds if seconds > 0 else 0.0

    def _status(self, now: float) -> str:
        rate = self._rate(now)
        parts = [f"{self.done:,} {self.unit}" if self.total is None else f"{self.done:,}/{self.total:,} {self.unit}"]
        if rate > 0:
            parts.append(_rate_text(rate))
            if self.total is not None:
                parts.append(f"{_duration(max(0, self.total - self.done) / rate)} left")
        return ", ".join(parts + self._field_texts())

    def _closing_line(self, finished: bool) -> str:
        now = time.monotonic()
        rate = self._rate(now)
        new = self.done - self._found
        if finished and new == 0 and self._found:
            return f"{self.label}: {self.done:,} {self.unit}, all done before"
        stopped = "" if finished else "stopped at "
        total = "" if finished or self.total is None else f"/{self.total:,}"
        parts = [f"{self.label}: {stopped}{self.done:,}{total} {self.unit}"]
        if self._found:
            parts.append(f"{new:,} of them now")
        parts += [_rate_text(rate)] if rate > 0 else []
        return ", ".join([*parts, f"{_duration(now - self._began)} in all", *self._field_texts()])

    def _field_texts(self) -> list[str]:
        return [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._fields.items()
        ]


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _shared_console() -> "Console":
    """One console for all bars: rich can stack bars that share one, and garbles those that do not."""
    from rich.console import Console

    global _console
    if _console is None:
        _console = Console(stderr=True)
    return _console


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def _duration(seconds: float) -> str:
    """Returns `m:ss`, or `h:mm:ss` from an hour on."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
