"""The list of hits that a search prints."""

import pytest

from llara.cli.hits import Row, render_hits

ROWS = [
    Row(1, 0.91234, "d1", "A title", "The first text " * 30),
    Row(2, 0.5, "an-id", "", "short\n\ttext"),
    Row(10, -1.25, "d3", "Title only", ""),
]


def test_rank_score_title_or_id_and_snippet() -> None:
    lines = render_hits(ROWS, width=60, colour=False).splitlines()
    assert lines[0] == "  1   0.9123  A title"
    assert lines[1] == "    d1"
    assert lines[2].startswith("    The first text The first") and lines[3].endswith(" …")
    assert lines[4:] == ["  2   0.5000  an-id", "    short text", " 10  -1.2500  Title only", "    d3"]
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    rows = [Row(1, 0.5, "i" * 300, "t " * 300, "word " * 1000)]
    assert max(map(len, render_hits(rows, width=width, colour=False).splitlines())) <= width


def test_colour_only_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b[1mA title\x1b[0m" in render_hits(ROWS, width=60, colour=True)
    assert "\x1b" not in render_hits(ROWS, width=60)  # captured output is no terminal


def test_a_document_cannot_steer_the_terminal() -> None:
    shown = render_hits([Row(1, 0.5, "d", "red \x1b[31m\x07", "\x1b]0;title\x07 text")], width=60, colour=False)
    assert "\x1b" not in shown and "\x07" not in shown


def test_no_hits() -> None:
    assert render_hits([]) == "no hits"
