"""What a fine-tuning configuration finds wrong with itself."""

from pathlib import Path
from typing import Any

import pytest

from llara.config import FinetuneConfig
from llara.errors import ConfigError

TWO = (Path("a"), Path("b"))


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "mini", "train": TWO, "output": Path("out"), **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"train": ()}, "--train: is required"),
        ({"temperature": 0.0}, "--temperature: must be above 0, got 0.0"),
        ({"teacher_temperature": -1.0, "distill": "kl"}, "--teacher-temperature: must be above 0, got -1.0"),
        ({"mixing": -0.5}, "--mixing: must be 0 or more, got -0.5"),
        ({"margin": -0.1}, "--margin: must be 0 or more, got -0.1"),
        ({"relative_margin": 1.5}, "--relative-margin: must be between 0 and 1, got 1.5"),
        ({"graph_budget": -1}, "--graph-budget: must be 0 or more, got -1"),
        ({"query_prompts": ("a", "b", "c")}, "--query-prompts: one for all or one for each of the 2 paths of --train"),
        ({"passage_prompts": ("a",) * 3}, "--passage-prompts: one for all or one for each of the 2 paths of --train"),
        (
            {"query_prompts": ("a", "b"), "dev": (Path("d"),)},
            "--dev: with prompts of their own for 2 sets, give a path for each, in the order of --train",
        ),
        ({"queries": Path("q")}, "--queries: names queries by id, which needs --corpus for the passages"),
        ({"patience": 2}, "--patience: needs --dev, to tell a better step from a worse one"),
        ({"matryoshka_dims": (8, 8)}, "--matryoshka-dims: must be different numbers of 1 or more, got 8, 8"),
        ({"matryoshka_dims": (0,)}, "--matryoshka-dims: must be different numbers of 1 or more, got 0"),
        ({"matryoshka_weights": (1.0,)}, "--matryoshka-weights: 1 of them for the 0 --matryoshka-dims"),
        (
            {"matryoshka_dims": (8,), "matryoshka_weights": (float("inf"),)},
            "--matryoshka-weights: must be above 0, got inf",
        ),
        ({"contrast_weight": 0.0}, "--contrast-weight: nothing is left to train on; choose --distill, too"),
        ({"distill": "kl", "distill_weight": 0.0}, "--distill-weight: 0 learns nothing from the teacher"),
        ({"distill_weight": 2.0}, "--distill-weight: goes with --distill"),
        ({"distill": "margin-mse", "teacher_temperature": 2.0}, "--teacher-temperature: goes with --distill kl"),
        (
            {"distill": "kl", "contrast_weight": 0.0, "margin": 0.1},
            "--margin: goes with --contrast-weight above 0",
        ),
        ({"dev_split": "test"}, "--dev-split: goes with --dev"),
        ({"dev_queries": 9}, "--dev-queries: goes with --dev"),
        ({"dev_passages": 9}, "--dev-passages: goes with --dev"),
        ({"task": "rerank", "query_length": 64, "length": 64}, "--query-length: 64 of --length 64 leave no room"),
        ({"train": "train.jsonl"}, "--train: must be a tuple of values, got a str"),
        ({"distill": "kl", "negatives": 0}, "--negatives: --distill compares a positive with negatives; ask for some"),
    ],
)
def test_what_cannot_be_right_is_said(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert [each.startswith(problem) for each in caught.value.problems] == [True]


def test_what_can_be_right_is_taken() -> None:
    assert config(query_prompts=("all: ",), dev=(Path("d"),)).query_prompts == ("all: ",)
    assert config(query_prompts=("a", "b"), dev=(Path("d"), Path("e"))).dev == (Path("d"), Path("e"))
    assert config(train=(*TWO, *TWO), query_prompts=("a", "b")).train == (*TWO, *TWO)
    assert config(distill="kl", contrast_weight=0.0, mixing=0.0, graph_budget=0).mixing == 0.0
    assert config(margin=0.0, distill="kl", teacher_temperature=2.0).margin == 0.0
