"""What is found of one model: terms per embedding, what two embeddings share, and how far it can be trusted."""

from dataclasses import dataclass, field

from llara.explain.align import Alignment
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
