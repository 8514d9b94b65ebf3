"""Tables of an explanation: what is visible, what is coloured, and that no text can steer a terminal."""

from typing import Any

import pytest

from llara.explain.align import Alignment
from llara.explain.records import ModelView, PairView, SaidTerm, SharedTerm, TextView
from llara.explain.render import beginning, counted, label, render
from llara.explain.result import Explanation


def explanation(*models: str, term: str = "sky", text: str = "the sky") -> Explanation:
    views = []
    for model in models:
        said = (SaidTerm(term, 2.0, True), SaidTerm("text", 1.0, False))
        query, document = (TextView(side, text, 2, 1, said) for side in ("query", "passage"))
        pair = PairView(0, 0, 0.5, 4.0, (SharedTerm(term, 2.0, 2.0, 4.0, 1.0),))
        views.append(
            ModelView(model, (query,), (document,), (pair,), Alignment(0.4, 0.1, 0.01, 9, "here"), {"query": 0.5})
        )
    return Explanation(tuple(views), 10)


def shown(found: Explanation, **settings: Any) -> str:
    return render(found.views, found.show, **settings)


@pytest.mark.parametrize(
    ("term", "visible"),
    [("read", "read"), (" read", "␣read"), ("  ", "␣␣"), ("\n", r"\n"), ("a b", "a b"), ("\x1b[31m", r"\x1b[31m"),
     ("x ", "x␣"), ("漢", "漢"), ("\u200b", r"\u200b")],
)  # fmt: skip
def test_a_label_is_visible(term: str, visible: str) -> None:
    assert label(term) == visible and visible.isprintable()


def test_a_beginning_fits_its_width() -> None:
    assert beginning("the  sky\nis blue", 20) == "the sky is blue"
    assert beginning("the sky is blue", 8) == "the sky…"
    assert beginning("漢字漢字漢字", 8) == "漢字漢…"  # two columns each
    assert beginning("a" * 10**6, 20) == "a" * 19 + "…"
    assert beginning("漢字", 4) == "漢字"


def test_counts_have_their_plural() -> None:
    assert [counted(number, "term") for number in (0, 1, 2000)] == ["0 terms", "1 term", "2,000 terms"]


def test_the_plain_table_is_aligned_and_has_no_codes() -> None:
    text = shown(explanation("m", term="[red]x[/red] \x1b[31m"), terminal=False)
    assert "\x1b" not in text
    assert r"[red]x[/red] \x1b[31m" in text  # no markup is read, no code passed on
    rows = text[text.index("query (NEXT side)") :].splitlines()[2:5]
    assert len({row.index(word) for row, word in zip(rows, ("from", "text", "expansion"), strict=True)}) == 1
    assert "m: alignment 0.400, chance 0.100" in text and "9 texts: here" in text
    assert "it holds 50% of their squared length" in text


def test_a_terminal_gets_colours_on_the_last_column_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(explanation("m"), width=100, terminal=True)
    assert "\x1b[1;36mtext" in text and "\x1b[33mexpansion" in text
    row = next(line for line in text.splitlines() if "1.00" in line)
    assert row.lstrip().startswith("text ")  # a term that is called so, and no mark
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in shown(explanation("m"), width=100, terminal=True)


def test_two_models_share_a_table() -> None:
    text = shown(explanation("before", "after"), terminal=False)
    head = next(line for line in text.splitlines() if line.startswith("term: before"))
    assert head.split() == ["term:", "before", "weight", "from", "term:", "after", "weight", "from"]
    assert "the embedding says: 1 of 2, 1 of 2" in text
