"""The picture: which panels it has, and that it is drawn in full, always alike, and with any text."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llara.errors import StorageError
from llara.explain.plot import EXPANSION, IN_TEXT, SHARED, panel_rows, write_plot
from llara.explain.records import SaidTerm
from llara.explain.result import Explanation
from tests.explain.test_render import explanation

matplotlib = pytest.importorskip("matplotlib", reason="the extra `report` is not installed")

from llara.explain import plot  # noqa: E402


def without_pairs(*models: str) -> Explanation:
    found = explanation(*models)
    return replace(found, views=tuple(replace(view, pairs=()) for view in found.views))


def drawn(found: Explanation) -> Any:
    return laid_out(plot._draw(panel_rows(found), found))


def laid_out(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # the canvas that a figure is born with draws nothing
    return figure


def test_a_pair_is_a_row_of_three_per_model() -> None:
    rows = panel_rows(explanation("before", "after"))
    assert [[panel.title.split("\n")[0] for panel in row] for row in rows] == [
        [f"{model} · {what}" for what in ("Query (NEXT)", "Document (SELF)", "Shared")] for model in ("before", "after")
    ]
    query, _, shared = rows[0]
    assert (query.names, query.lengths, query.colours) == (["sky", "text"], [2.0, 1.0], [IN_TEXT, EXPANSION])
    assert (shared.names, shared.lengths, shared.colours) == (["sky"], [4.0], [SHARED])


def test_texts_without_pairs_stand_beside_each_other() -> None:
    assert [len(row) for row in panel_rows(without_pairs("m"))] == [2]
    titles = [[panel.title.split("\n")[0] for panel in row] for row in panel_rows(without_pairs("before", "after"))]
    assert titles == [
        [f"{model} · {what}" for model in ("before", "after")] for what in ("Query (NEXT)", "Document (SELF)")
    ]


def test_only_as_many_terms_as_asked_for_are_drawn() -> None:
    rows = panel_rows(replace(explanation("m"), show=1))
    assert [len(panel.names) for panel in rows[0]] == [1, 1, 1]


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_explanation_gives_the_same_file(kind: str, tmp_path: Path) -> None:
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for name in ("a", "b"):
        write_plot(explanation("before", "after"), tmp_path / f"{name}.{kind}")
    content = (tmp_path / f"a.{kind}").read_bytes()
    assert content.startswith(starts[kind]) and content == (tmp_path / f"b.{kind}").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {f"a.{kind}", f"b.{kind}"}


@pytest.mark.parametrize("term", ["$x_1$", "漢字", "\U0001f600", "\U0010fffd", "x" * 200, "\x1b[31m", "שלום"])
def test_any_term_can_be_drawn(term: str, tmp_path: Path) -> None:
    """Warnings are errors here, so a character without a glyph would fail."""
    write_plot(explanation("m" * 80, term=term, text=f"{term} and more " * 30), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_character_that_no_font_has_is_written_as_its_number() -> None:
    fonts, missing = plot._fonts(["sky \U0010fffd\n"])
    assert missing == {"\U0010fffd"} and fonts == ["DejaVu Sans"]
    panel = plot._writable(panel_rows(explanation("m", term="a\U0010fffd"))[0][0], missing)
    assert panel.names[0] in (r"a\U0010fffd", "aU+10FFFD")


def test_panels_do_not_overlap_and_bars_are_equally_thick() -> None:
    found = explanation("a" * 60, "b" * 60, term="x" * 60, text="the sky is blue " * 40)
    rows = [[plot._writable(panel, set()) for panel in row] for row in panel_rows(found)]
    figure = laid_out(plot._draw(rows, found))
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) == 6
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    caption, legend = figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()
    assert not any(box.overlaps(other) for box in boxes for other in (caption, legend))
    thick = {round(bar.get_window_extent().height, 2) for axes in figure.axes for bar in axes.patches}
    assert max(thick) - min(thick) < 0.2 * max(thick)


def test_an_embedding_that_says_nothing_says_so() -> None:
    found = explanation("m")
    view = found.views[0]
    silent = replace(view, queries=(replace(view.queries[0], terms=()),))
    axes = drawn(replace(found, views=(silent,))).axes
    assert [text.get_text() for text in axes[0].texts] == ["nothing"] and not axes[1].texts


def test_a_plot_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, OSError)):
        write_plot(explanation("m"), tmp_path / "file" / "p.png")
    assert (tmp_path / "file").read_text() == ""


def test_a_doubtful_model_is_marked() -> None:
    found = explanation("m")
    view = found.views[0]
    doubtful = replace(view, alignment=replace(view.alignment, recall=0.1))
    assert "near chance: not to be trusted" in drawn(replace(found, views=(doubtful,)))._suptitle.get_text()
    assert "near chance" not in drawn(found)._suptitle.get_text()


def test_the_longest_lists_are_cut_to_the_room(tmp_path: Path) -> None:
    found = explanation("m")
    view = found.views[0]
    many = tuple(SaidTerm(f"term{number}", 2.0, False) for number in range(60))
    crowded = replace(view, queries=(replace(view.queries[0], terms=many),))
    figure = drawn(replace(found, views=(crowded,), show=60))
    labels = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert len(labels) == 60
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(labels))
