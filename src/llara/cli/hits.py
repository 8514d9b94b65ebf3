"""One query's hits as a readable list: rank, score, title or id, and the beginning of the text."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

SNIPPET_LINES = 2
MIN_WIDTH, MAX_WIDTH = 40, 120  # longer lines are hard to read


class Row(NamedTuple):
    """One hit as it is shown; title and text may be empty."""

    rank: int
    score: float
    id: str
    title: str
    text: str


def render_hits(rows: Iterable[Row], width: int | None = None, colour: bool | None = None) -> str:
    """Returns the list, wrapped at `width` columns (default: the terminal's), coloured on a terminal only."""
    width = max(MIN_WIDTH, width or min(MAX_WIDTH, shutil.get_terminal_size((100, 24)).columns))
    paint = _on_colour_terminal() if colour is None else colour
    return "\n".join(line for row in rows for line in _lines(row, width, paint)) or "no hits"


def _lines(row: Row, width: int, paint: bool) -> list[str]:
    margin = " " * 4
    title, text = _clean(row.title), _clean(row.text)
    head = textwrap.shorten(title or row.id, width - 14, placeholder=" …")
    lines = [f"{row.rank:>3} {_style(f'{row.score:8.4f}', '2', paint)}  {_style(head, '1', paint)}"]
    if title and row.id:
        lines.append(_style(margin + textwrap.shorten(row.id, width - 4, placeholder=" …"), "2", paint))
    # A text may be a megabyte long; only its beginning is wrapped.
    body = textwrap.wrap(text[: width * (SNIPPET_LINES + 1)], width - 4, max_lines=SNIPPET_LINES, placeholder=" …")
    return [*lines, *(margin + line for line in body)]


def _clean(text: str) -> str:
    """One line, without control characters: a document must not be able to steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _style(text: str, code: str, paint: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if paint else text


def _on_colour_terminal() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
