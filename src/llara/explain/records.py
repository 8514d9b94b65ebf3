"""What `explain` found: terms per embedding, what two embeddings share, and how far all of it can be trusted."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llara.explain.align import Alignment
from llara.invocation import shell_line
from llara.templates import SideName


@dataclass(frozen=True)
class SaidTerm:
    """One term that an embedding says; `in_text` tells those that stand in the text from expansions."""

    term: str
    weight: float
    in_text: bool


@dataclass(frozen=True)
class TextView:
    """What one embedding says.

    Attributes:
        side: query (the template's NEXT side) or passage (SELF).
        text: The text.
        own: Terms that stand in the text, as far as the model read it.
        own_said: How many of them are among the terms that the embedding says.
        terms: All terms that it says, the largest weight first.
    """

    side: SideName
    text: str
    own: int
    own_said: int
    terms: tuple[SaidTerm, ...]


@dataclass(frozen=True)
class SharedTerm:
    """A term that two embeddings say; its contribution is the product of the two weights, `share` that of their sum."""

    term: str
    query_weight: float
    document_weight: float
    contribution: float
    share: float


@dataclass(frozen=True)
class PairView:
    """A query beside a document, by their numbers.

    Attributes:
        query: Which query, from 0.
        document: Which document, from 0.
        score: Inner product of the two vectors, which is what a search ranks by.
        lexical: Inner product of the two sets of weights: the sum of the contributions.
        shared: Terms that both say, the largest contribution first.
    """

    query: int
    document: int
    score: float
    lexical: float
    shared: tuple[SharedTerm, ...]


@dataclass(frozen=True)
class ModelView:
    """What the embeddings of one model say.

    Attributes:
        model: The model, as the user named it.
        alignment: How far this can be trusted.
        removed: Share of the sample's embeddings that the removed component held, per side; empty where none was.
    """

    model: str
    queries: tuple[TextView, ...]
    documents: tuple[TextView, ...]
    pairs: tuple[PairView, ...]
    alignment: Alignment
    removed: dict[SideName, float] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[TextView, ...]:
        """All embeddings, queries first."""
        return (*self.queries, *self.documents)


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
        from llara.explain.render import render

        return render(self)
