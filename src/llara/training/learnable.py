"""Whether there is anything to learn from a run's examples, looked at before its first step.

A query learns from passages that are not relevant to it: its own hard negatives, and the other passages of its batch.
Without any, the loss is zero and so is its gradient: a run would go through and leave the model as it was.
"""

from collections.abc import Callable, Iterator, Sequence

from llara.config import FinetuneConfig
from llara.data.store import ExampleSet
from llara.errors import DataError
from llara.progress import note

Join = Callable[[str, str], str]
MINE = "mine some with: llara mine"


def check_learnable(sets: Sequence[ExampleSet], config: FinetuneConfig, join: Join, world: int = 1) -> None:
    """Refuses examples from which nothing can be learned, and says where that holds for a part of them.

    Args:
        sets: The examples.
        config: The task, its losses, and what a batch holds.
        join: Makes one text of a title and a text; equal texts are one passage.
        world: Processes whose batches are compared with each other.

    Raises:
        DataError: Names the sets, why nothing can be learned from them, and what to do.
    """
    if config.task == "rerank" or not config.contrast_weight:
        _check_negatives(sets, config, join)
        return
    alone = config.batch_size * world == 1
    groups = [[each] for each in sets] if config.homogeneous else [list(sets)]
    idle = [group for group in groups if (alone or not _differ(group, join)) and not _any_negative(group, config, join)]
    why = _why(config, alone=alone)
    if len(idle) == len(groups):
        raise DataError(_names(sets), None, f"nothing can be learned: {why}")
    for group in idle:
        note(f"{_names(group)}: its batches teach nothing: {why}")
    without = _without_negatives([each for group in groups if group not in idle for each in group]) if alone else 0
    if without:
        advice = "raise --batch-size, or mine negatives for them with: llara mine"
        note(f"{without:,} examples have no hard negative, and a batch of one query teaches nothing then; {advice}")


def _check_negatives(sets: Sequence[ExampleSet], config: FinetuneConfig, join: Join) -> None:
    """Refuses a set of which no example has a negative, where each query is compared within its own passages."""
    for examples in sets:
        if not _any_negative([examples], config, join):
            who = "a reranker is trained" if config.task == "rerank" else "--distill compares a positive"
            verb = "against" if config.task == "rerank" else "with"
            raise DataError(examples.name, None, f"no example has a hard negative, which {who} {verb}; {MINE}")
    without = _without_negatives(sets)
    if without:
        note(f"{without:,} of {sum(map(len, sets)):,} examples have no hard negative, and teach nothing")


def _why(config: FinetuneConfig, *, alone: bool) -> str:
    negatives = "no example has a hard negative" if config.negatives else "--negatives 0 leaves out the hard negatives"
    if alone:
        return f"a batch of one query holds no other passage, and {negatives}; raise --batch-size, or {MINE}"
    same = "all examples have the same query or the same relevant passages"
    return f"{same}, and {negatives}; add examples, or {MINE}"


def _differ(group: Sequence[ExampleSet], join: Join) -> bool:
    """Tells whether two examples have different queries and different relevant passages; mostly the first two do."""
    first: tuple[str, frozenset[str]] | None = None
    other_query = other_passages = False
    for examples, number in _all(group):
        example = examples[number]
        found = (example.query, frozenset(_text(examples, each, join) for each in example.positives))
        first = first or found
        differs = found[0] != first[0], found[1] != first[1]
        other_query, other_passages = other_query or differs[0], other_passages or differs[1]
        # One that differs from the first in its query alone, and one that does in its passages, differ in both.
        if other_query and other_passages:
            return True
    return False


def _any_negative(group: Sequence[ExampleSet], config: FinetuneConfig, join: Join) -> bool:
    """Tells whether an example has a hard negative that is no copy of its positives."""
    if not config.negatives:
        return False
    for examples, number in _all(group):
        example = examples[number]
        if example.negatives:
            relevant = {_text(examples, each, join) for each in example.positives}
            if any(_text(examples, each, join) not in relevant for each in example.negatives):
                return True
    return False


def _without_negatives(sets: Sequence[ExampleSet]) -> int:
    return sum(not examples[number].negatives for examples, number in _all(sets))


def _all(sets: Sequence[ExampleSet]) -> Iterator[tuple[ExampleSet, int]]:
    for examples in sets:
        for number in range(len(examples)):
            yield examples, number


def _text(examples: ExampleSet, number: int, join: Join) -> str:
    passage = examples.passage(number)
    return join(passage.title, passage.text)


def _names(sets: Sequence[ExampleSet]) -> str:
    return ", ".join(each.name for each in sets)
