"""The plain records that pass between jobs. They hold data and no behaviour beyond their own text."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One unit of a corpus. `metadata` holds the remaining fields of its row, as JSON values."""

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = {}


class Query(NamedTuple):
    """One information need."""

    id: str
    text: str


class Qrel(NamedTuple):
    """One relevance judgement; `relevance` above 0 means relevant."""

    query_id: str
    document_id: str
    relevance: int


class Hit(NamedTuple):
    """One entry of a run: `rank` counts from 1 within its query, `score` is larger for better."""

    query_id: str
    document_id: str
    rank: int
    score: float


class Passage(NamedTuple):
    """A document's text as training sees it: the title is kept apart, so that one rule joins it everywhere."""

    text: str
    title: str = ""


class Example(NamedTuple):
    """One training example: a query, at least one relevant passage, and any number of hard negatives.

    Where a teacher has scored the passages, its scores stand beside them, one for each; else there are none.
    """

    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()
