"""Examples from which nothing, or only in part, can be learned: said before the first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llara.contract import join_title
from llara.errors import DataError
from llara.training import learnable
from llara.training.examples import Drawn
from llara.training.learnable import check_learnable
from llara.training.rerank import _without_copies
from tests.training.examples import Rows, row, sets_of, settings

SAME = "all examples have the same query or the same relevant passages, and no example has a hard negative"
ALONE = "a batch of one query holds no other passage, and no example has a hard negative"
TITLES = {"query": "q", "pos": [{"title": "T", "text": "x"}], "neg": [{"title": "U", "text": "x"}]}


def joined(title: str, text: str) -> str:
    return join_title(" ", title, text)


def untitled(title: str, text: str) -> str:
    return join_title(None, title, text)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(learnable, "note", said.append)
    return said


@pytest.mark.parametrize(
    ("rows", "changes", "why"),
    [
        ([row("q", ["a"])], {}, f"{SAME}; add examples, or mine some with: llara mine"),
        ([row("q", ["a"]), row("q", ["b"])], {}, SAME),
        ([row("q", ["a", "b"]), row("r", ["b", "a"])], {}, SAME),
        ([row("q", ["a"], ["n"])], {"negatives": 0}, "--negatives 0 leaves out the hard negatives; add examples"),
        ([row("q", ["a"]), row("r", ["b"])], {"batch_size": 1}, f"{ALONE}; raise --batch-size, or mine some with"),
        ([row("q", ["a"]), row("r", ["b"])], {"batch_size": 1, "accumulation": 4}, ALONE),
    ],
)
def test_a_set_that_teaches_nothing_is_refused(tmp_path: Path, rows: Rows, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(DataError) as caught:
        check_learnable(sets_of(tmp_path, rows), settings(**changes), joined)
    assert str(caught.value).startswith(f"{tmp_path / 'set0.jsonl'}: nothing can be learned: ")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "changes", "world"),
    [
        ([row("q", ["a"]), row("r", ["b"])], {}, 1),
        ([row("q", ["a"]), row("r", ["a"]), row("q", ["b"])], {}, 1),  # what the first two share, the third breaks
        ([row("q", ["a"]), row("q", ["b"]), row("r", ["a"])], {}, 1),
        ([row("q", ["a", "b"]), row("r", ["b"])], {}, 1),
        ([row("q", ["a"], ["n"])], {"batch_size": 1}, 1),
        ([row("q", ["a"]), row("r", ["b"])], {"batch_size": 1}, 2),  # processes compare each other's passages
    ],
)
def test_a_set_that_teaches_is_taken_without_a_word(
    tmp_path: Path, notes: list[str], rows: Rows, changes: dict[str, Any], world: int
) -> None:
    check_learnable(sets_of(tmp_path, rows), settings(**changes), joined, world)
    assert notes == []


def test_one_of_several_sets_may_teach_nothing_and_is_named(tmp_path: Path, notes: list[str]) -> None:
    sets = sets_of(tmp_path, [row("q", ["a"]), row("r", ["b"])], [row("s", ["c"])])
    check_learnable(sets, settings(), joined)
    assert notes == [f"{tmp_path / 'set1.jsonl'}: its batches teach nothing: {SAME}; add examples, or {learnable.MINE}"]
    check_learnable(sets, settings(homogeneous=False), joined)  # in batches of several sets it does
    assert len(notes) == 1


def test_sets_that_teach_in_mixed_batches_alone(tmp_path: Path) -> None:
    sets = sets_of(tmp_path, [row("q", ["a"])], [row("r", ["b"])])
    check_learnable(sets, settings(homogeneous=False), joined)
    with pytest.raises(DataError, match=r"set0\.jsonl, .*set1\.jsonl: nothing can be learned"):
        check_learnable(sets, settings(), joined)


def test_batches_of_one_query_learn_nothing_from_examples_without_negatives(tmp_path: Path, notes: list[str]) -> None:
    sets = sets_of(tmp_path, [row("q", ["a"], ["n"]), row("r", ["b"]), row("s", ["c"])])
    check_learnable(sets, settings(batch_size=1), joined)
    (said,) = notes
    assert said.startswith("2 examples have no hard negative, and a batch of one query teaches nothing then")
    check_learnable(sets, settings(batch_size=2), joined)
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"task": "rerank", "temperature": 0.01}, "which a reranker is trained against; mine some with: llara mine"),
        ({"distill": "kl", "contrast_weight": 0.0}, "which --distill compares a positive with; mine some with"),
    ],
)
def test_where_each_query_is_compared_within_its_own_passages(
    tmp_path: Path, notes: list[str], changes: dict[str, Any], why: str
) -> None:
    config = settings(**{"passage_length": None, **changes})
    good, bare = [row("q", ["a"], ["n"]), row("r", ["b"])], [row("s", ["c"]), row("t", ["d"])]
    check_learnable(sets_of(tmp_path / "good", good), config, joined)
    assert notes == ["1 of 2 examples have no hard negative, and teach nothing"]
    with pytest.raises(DataError) as caught:
        check_learnable(sets_of(tmp_path / "bare", good, bare), config, joined)
    assert str(caught.value).startswith(f"{tmp_path / 'bare' / 'set1.jsonl'}: no example has a hard negative, {why}")


@pytest.mark.parametrize(("join", "teaches"), [(joined, True), (untitled, False)])
def test_a_negative_with_the_text_of_a_positive_is_none(
    tmp_path: Path, join: Callable[[str, str], str], teaches: bool
) -> None:
    sets = sets_of(tmp_path, [TITLES])
    config = settings(task="rerank", passage_length=None, temperature=0.01)
    if teaches:
        check_learnable(sets, config, join)
    else:
        with pytest.raises(DataError, match="no example has a hard negative"):
            check_learnable(sets, config, join)


def test_a_reranker_is_not_trained_against_copies() -> None:
    drawn = Drawn(0, "q", ("a", "n", "b", "a", "m"), ("a", "b"), ())
    assert _without_copies(drawn).passages == ("a", "n", "m")
