"""Explanations as tables: drawn by rich on a terminal, in plain aligned columns elsewhere."""

import io
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llara.explain.records import ModelView, PairView, TextView

SIDES = {"query": "query (NEXT side)", "passage": "document (SELF side)"}
WHERE = {True: "text", False: "expansion"}
STYLES = {"text": "bold cyan", "expansion": "yellow"}
HEADING = 100  # columns of a text that stand above its table
UNLIMITED = 10_000  # columns, where no terminal cuts them

Cells = Sequence[tuple[str, ...]]


def render(views: Sequence[ModelView], show: int, width: int | None = None, terminal: bool | None = None) -> str:
    """Returns all tables; those of two models stand side by side.

    Args:
        views: What to show, one per model.
        show: Terms of each list that are shown.
        width: Columns; default: those of the terminal.
        terminal: Whether to draw with lines and colours; default: whether stdout is a terminal.
    """
    drawn = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" if terminal is None else terminal
    columns = width or (shutil.get_terminal_size((100, 24)).columns if drawn else UNLIMITED)
    out = io.StringIO()
    console = Console(file=out, width=columns, force_terminal=drawn, highlight=False, markup=False, emoji=False)
    for line in _trust(views):
        console.print(line, soft_wrap=True)
    for title, table in _tables(views, show, drawn):
        console.print()
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def label(term: str) -> str:
    """Returns a term in visible characters: outer blanks as open boxes, control characters as escapes."""
    bare = term.strip(" ")
    before = len(term) - len(term.lstrip(" "))
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in bare)
    if not bare:
        return "␣" * len(term)
    return "␣" * before + text + "␣" * (len(term) - before - len(bare))


def counted(number: int, noun: str) -> str:
    """Returns `1 term`, `2 terms`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def beginning(text: str, width: int) -> str:
    """Returns the beginning of a text as one line that is at most `width` columns wide; some characters take two."""
    line = label(" ".join(text[: width * 4].split()))
    return line if cell_len(line) <= width and len(text) <= width * 4 else set_cell_size(line, width - 1).rstrip() + "…"


def heading(view: TextView) -> str:
    """Returns one line that names a text: side and beginning."""
    return f"{SIDES[view.side]}: {beginning(view.text, HEADING)}"


def trust(view: ModelView) -> str:
    """Returns what the alignment of a model says, in one line."""
    found = view.alignment
    return (
        f"{view.model}: alignment {found.recall:.3f}, chance {found.chance:.3f} (the share of a text's own terms, and "
        f"of another text's, among what its embedding says most; {found.texts} texts: {found.source})"
    )


def _trust(views: Sequence[ModelView]) -> Iterator[str]:
    for view in views:
        yield trust(view)
        for side, share in view.removed.items():
            name = "query" if side == "query" else "document"
            yield (
                f"{view.model}: first principal component of the {name} embeddings removed; in the sample it holds "
                f"{share:.0%} of their squared length"
            )


def _tables(views: Sequence[ModelView], show: int, drawn: bool) -> Iterator[tuple[str, Table]]:
    names = [view.model for view in views]
    for texts in zip(*(view.texts for view in views), strict=True):
        counts = ", ".join(f"{view.own_said} of {view.own}" for view in texts)
        title = f"{heading(texts[0])}\nof the text's own terms, the embedding says: {counts}"
        cells = [[_term(term.term, term.weight, WHERE[term.in_text]) for term in view.terms[:show]] for view in texts]
        yield title, _side_by_side(names, ("term", "weight", "from"), cells, drawn)
    for pairs in zip(*(view.pairs for view in views), strict=True):
        yield _pair_heading(pairs), _side_by_side(names, _SHARED, [_shared(pair, show) for pair in pairs], drawn)


_SHARED = ("shared", "query", "document", "product", "share")


def _pair_heading(pairs: Sequence[PairView]) -> str:
    first = pairs[0]
    scores = "; ".join(
        f"score {pair.score:.4f}, {counted(len(pair.shared), 'shared term')}, {pair.lexical:.2f} in all"
        for pair in pairs
    )
    return f"query {first.query + 1} and document {first.document + 1}: {scores}"


def _term(term: str, weight: float, where: str) -> tuple[str, ...]:
    return label(term), f"{weight:.2f}", where


def _shared(pair: PairView, show: int) -> Cells:
    return [
        (
            label(each.term),
            f"{each.query_weight:.2f}",
            f"{each.document_weight:.2f}",
            f"{each.contribution:.2f}",
            f"{each.share:.1%}",
        )
        for each in pair.shared[:show]
    ]


def _side_by_side(names: Sequence[str], titles: Sequence[str], cells: Sequence[Cells], drawn: bool) -> Table:
    """Returns one table with a group of columns per model, whose name stands over its terms."""
    table = Table(box=box.SIMPLE_HEAD if drawn else None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        for number, title in enumerate(titles):
            head = f"{title}: {name}" if len(names) > 1 and not number else title
            right = title in ("weight", *_SHARED[1:])
            table.add_column(Text(head), justify="right" if right else "left", overflow="fold")
    for row in itertools.zip_longest(*cells, fillvalue=("",) * len(titles)):
        named = [(title, cell) for group in row for title, cell in zip(titles, group, strict=True)]
        table.add_row(*(Text(cell, style=STYLES.get(cell, "") if title == "from" else "") for title, cell in named))
    return table
