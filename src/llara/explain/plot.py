"""Explanations as a picture, by matplotlib: bars per embedding, and the products of what a query and a document share.

Labels are tokens of any script. Fonts for them are looked for on this machine; a character that none of them has is
written as its code point, so that no picture holds empty boxes.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llara.explain.records import ModelView, PairView, TextView
from llara.explain.render import beginning, counted, label
from llara.explain.result import Explanation
from llara.files import write_atomic

IN_TEXT, EXPANSION, SHARED = "#1f6fb2", "#e08214", "#4d9a5a"  # told apart also by who sees no red or green
COLUMNS = 3  # panels side by side
PANEL_WIDTH, BAR_HEIGHT, PANEL_MARGIN, MARGIN = 4.8, 0.22, 1.1, 1.0  # inches
TITLE_WIDTH, LABEL_WIDTH = 44, 20  # columns of text; some characters take two
DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib


class Panel(NamedTuple):
    """One panel: a title, a name and a length for each bar, its colour, and what the lengths are."""

    title: str
    names: list[str]
    lengths: list[float]
    colours: list[str]
    axis: str


def write_plot(explanation: Explanation, path: Path) -> None:
    """Draws an explanation and publishes it under `path`, whose ending says as what; the same one to the same bytes.

    Raises:
        StorageError: The file cannot be written.
    """
    import matplotlib

    rows = panel_rows(explanation)
    texts = [text for row in rows for panel in row for text in (panel.title, *panel.names)]
    fonts, missing = _fonts(texts)
    settings: Any = {
        "font.family": fonts,
        "font.size": 9,
        "text.parse_math": False,  # a token may be "$"
        "svg.hashsalt": "llara",
    }
    kind = path.suffix.lower().removeprefix(".")
    out = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = _draw([[_writable(panel, missing) for panel in row] for row in rows], explanation)
        # Without a date and a version, the same explanation gives the same file.
        nothing = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        figure.savefig(out, format=kind, dpi=150, metadata=nothing)
    write_atomic(path, out.getvalue())


def panel_rows(explanation: Explanation) -> list[list[Panel]]:
    """Returns the panels of a plot in rows: query, document and what they share; per pair, the models below each other.

    Without pairs, each text is a panel, and models stand side by side.
    """
    views, show = explanation.views, explanation.show
    if not views[0].pairs:
        panels = [
            _said(view, text, views, show)
            for texts in zip(*(v.texts for v in views), strict=True)
            for view, text in zip(views, texts, strict=True)
        ]
        width = 2 if len(views) == 2 else COLUMNS
        return [panels[start : start + width] for start in range(0, len(panels), width)]
    rows = []
    for pairs in zip(*(view.pairs for view in views), strict=True):
        for view, pair in zip(views, pairs, strict=True):
            query, document = view.queries[pair.query], view.documents[pair.document]
            rows.append(
                [_said(view, query, views, show), _said(view, document, views, show), _shared(view, pair, views, show)]
            )
    return rows


def _said(view: ModelView, text: TextView, views: Sequence[ModelView], show: int) -> Panel:
    terms = text.terms[:show]
    what = "Query (NEXT)" if text.side == "query" else "Document (SELF)"
    return Panel(
        f"{_of(view, views)}{what}\n{beginning(text.text, TITLE_WIDTH)}",
        [label(term.term) for term in terms],
        [term.weight for term in terms],
        [IN_TEXT if term.in_text else EXPANSION for term in terms],
        "weight",
    )


def _shared(view: ModelView, pair: PairView, views: Sequence[ModelView], show: int) -> Panel:
    terms = pair.shared[:show]
    found = counted(len(pair.shared), "term") + (f" ({len(terms)} shown)" if len(terms) < len(pair.shared) else "")
    return Panel(
        f"{_of(view, views)}Shared\n{found}, score {pair.score:.3f}",
        [label(term.term) for term in terms],
        [term.contribution for term in terms],
        [SHARED] * len(terms),
        "product of the weights",
    )


def _of(view: ModelView, views: Sequence[ModelView]) -> str:
    return f"{_tail(view.model)} · " if len(views) > 1 else ""


def _tail(name: str) -> str:
    """Returns the end of a path, which tells models apart."""
    return name if len(name) <= 20 else f"…{name[-19:]}"


def _draw(rows: Sequence[Sequence[Panel]], explanation: Explanation) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    columns = max(map(len, rows))
    heights = [max(len(panel.names) for panel in row) * BAR_HEIGHT + PANEL_MARGIN for row in rows]
    size = (PANEL_WIDTH * columns, sum(heights) + MARGIN)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=size, layout=layout)  # no pyplot: it would keep the figure, and pick a window
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, places in zip(rows, axes, strict=True):
        for panel, place in zip(row, places[: len(row)], strict=True):
            _bars(place, panel, max(len(each.names) for each in row))
        for place in places[len(row) :]:
            place.set_axis_off()
    figure.suptitle("\n".join(_caption(view) for view in explanation.views), fontsize=9)
    patches = [Patch(color=IN_TEXT, label="stands in the text"), Patch(color=EXPANSION, label="expansion")]
    if explanation.views[0].pairs:
        patches.append(Patch(color=SHARED, label="said by both"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def _caption(view: ModelView) -> str:
    found = view.alignment
    doubt = "; near chance: not to be trusted" if found.near_chance else ""
    return f"{_tail(view.model)}: alignment {found.recall:.2f}, chance {found.chance:.2f}{doubt}"


def _bars(place: Any, panel: Panel, most: int) -> None:
    """Draws one panel; bars are as thick as if there were `most` of them, as in the panel of the row that has most."""
    places = range(len(panel.names))
    place.barh(places, panel.lengths, color=panel.colours, height=0.72)
    place.set_yticks(places, panel.names)
    place.set_ylim(max(most, 1) - 0.4, -0.6)  # the largest on top
    place.set_title(panel.title, fontsize=9, loc="left")
    place.set_xlabel(panel.axis, fontsize=8)
    place.tick_params(axis="x", labelsize=8)
    place.tick_params(axis="y", length=0)
    place.spines[["top", "right"]].set_visible(False)
    if not panel.names:
        place.text(0.5, 0.5, "nothing", ha="center", va="center", transform=place.transAxes)
        place.set_xticks([])


# Fonts -------------------------------------------------------------------------------------------------------------


def _fonts(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Returns names of fonts that together have the characters of the texts, and the characters that none here has."""
    from matplotlib import font_manager

    missing = {char for text in texts for char in text if char != "\n"}
    families = [DEFAULT_FONT]
    missing -= _characters(font_manager.findfont(DEFAULT_FONT))
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if not missing:
            break
        if entry.name.startswith("Last Resort"):  # comes with matplotlib and draws every character as a box
            continue
        usual = entry.style == "normal" and str(entry.weight) in ("400", "normal", "regular")
        if entry.name not in families and usual and (found := missing & _characters(entry.fname)):
            families.append(entry.name)
            missing -= found
    return families, missing


def _characters(path: str) -> set[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return {chr(code) for code in FT2Font(path).get_charmap()}
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or of a kind that it cannot draw
        return set()


def _writable(panel: Panel, missing: set[str]) -> Panel:
    """Returns a panel in characters that can be drawn, each line cut to the room that there is for it."""

    def written(text: str, width: int) -> str:
        return beginning("".join(f"U+{ord(char):04X}" if char in missing else char for char in text), width)

    title = "\n".join(written(line, TITLE_WIDTH) for line in panel.title.split("\n"))
    return panel._replace(title=title, names=[written(name, LABEL_WIDTH) for name in panel.names])
