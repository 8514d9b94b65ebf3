"""The result of `explain`: what the embeddings of one model or two say, as text and as JSON values."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llara.explain.records import ModelView
from llara.explain.render import render
from llara.invocation import shell_line


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        views: One per model: the one to compare with first, as it is the one before.
        show: Terms that a table and a plot show of each list.
        warnings: What speaks against trusting it.
        plot: The picture, where one was drawn.
    """

    views: tuple[ModelView, ...]
    show: int
    warnings: tuple[str, ...] = ()
    plot: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values, with what follows from the alignments."""
        values = asdict(self)
        for view, plain in zip(self.views, values["views"], strict=True):
            plain["alignment"] |= {"gain": view.alignment.gain, "near_chance": view.alignment.near_chance}
        return values

    @property
    def next_command(self) -> str:
        """The command that adapts a model that says little, or that searches with one that says much."""
        view = self.views[-1]
        if view.alignment.near_chance:
            return shell_line(["adapt", "--model", view.model, "--corpus", "PATH", "--output", "DIR"])
        question = view.queries[0].text if view.queries else "YOUR QUESTION"
        return shell_line(["search", question, "--model", view.model, "--index", "INDEX"])

    def to_text(self) -> str:
        """Returns tables for people."""
        return render(self.views, self.show)
