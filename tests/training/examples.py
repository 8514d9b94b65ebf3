"""Sets of training examples, as a run has them, from what a test says in a line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llara.config import FinetuneConfig
from llara.contract import Contract
from llara.data.store import ExampleSet, SetSource, TrainingData, prepare_examples
from llara.training.examples import ExampleDraw
from tests.training.helpers import finetune_config, write_lines

Rows = list[dict[str, Any]]


def row(query: str, positives: list[str], negatives: list[str] | None = None, **more: Any) -> dict[str, Any]:
    return {"query": query, "pos": positives, "neg": negatives or [], **more}


def sets_of(folder: Path, *rows: Rows) -> list[ExampleSet]:
    """Prepares sets of examples in a folder."""
    paths = [write_lines(folder / f"set{number}.jsonl", each) for number, each in enumerate(rows)]
    return prepare_examples(folder / "examples", TrainingData([SetSource(path) for path in paths]))


def settings(**changes: Any) -> FinetuneConfig:
    config = finetune_config(Path("base"), Path("train"), Path("out"))
    return replace(config, **changes)


def draw_of(
    sets: list[ExampleSet], contract: Contract | None = None, weights: list[int] | None = None, **changes: Any
) -> ExampleDraw:
    return ExampleDraw(sets, weights or [1] * len(sets), settings(**changes), contract or Contract())
