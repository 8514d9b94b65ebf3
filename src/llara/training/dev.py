"""How well a model in training finds held-out passages: loss, nDCG@10 and MRR@10 on a fixed pool.

Shapes: Q queries, P passages of the pool, D dimensions.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llara.config import FinetuneConfig
from llara.contract import Contract
from llara.data.collections import is_collection
from llara.data.store import ExampleSet
from llara.losses.contrast import InfoNCE
from llara.losses.rows import row_slices
from llara.progress import note
from llara.training.contrast import ContrastSource
from llara.training.examples import passage_text
from llara.training.trainer import to_device

DEPTH = 10
NAMES = ("dev_loss", "dev_ndcg", "dev_mrr")
CRITERION = "dev_ndcg"
Asked = tuple[int, str]  # the number of a set, and a query of it


class Pool(NamedTuple):
    """Queries and the passages they are ranked against, all different, with their sets, and what is relevant.

    relevant: int64 [2, E], pairs of query and passage. positives: int64 [Q], one relevant passage of each query.
    """

    queries: list[tuple[int, str]]
    passages: list[tuple[int, str]]
    relevant: Tensor
    positives: Tensor


def shuffle_queries(dev: Sequence[ExampleSet], rng: np.random.Generator) -> tuple[list[Asked], dict[Asked, list[int]]]:
    """Returns the queries of the dev sets in a random order, and the rows of each one in its set.

    Rows of a set with equal queries are one query; of another set they are not, whose prompt may differ.
    """
    rows: dict[Asked, list[int]] = {}
    for number, examples in enumerate(dev):
        for row in range(len(examples)):
            rows.setdefault((number, examples[row].query), []).append(row)
    asked = list(rows)
    return [asked[int(each)] for each in rng.permutation(len(asked))], rows


def note_overlap(config: FinetuneConfig) -> None:
    """Says which of the dev sets are trained on."""
    for path in dict.fromkeys(config.dev):
        if path in config.train and (config.split == config.dev_split or not is_collection(path)):
            note(f"--dev: {path} is trained on, too, so the best step there need not be the best elsewhere")


def make_pool(
    dev: Sequence[ExampleSet], train: Sequence[ExampleSet], config: FinetuneConfig, contract: Contract
) -> Pool:
    """Draws queries of the dev sets, and up to `dev_passages` passages: their own, then those of other examples.

    Their own all count, however many they are. Equal texts are one passage. The others are of dev, then of train.
    """
    rng = np.random.default_rng([config.seed, 4])
    order, rows = shuffle_queries(dev, rng)
    chosen = order[: config.dev_queries]
    others = [(each[0], row) for each in order[config.dev_queries :] for row in rows[each]]
    entered: dict[str, tuple[int, int]] = {}  # text: its number in the pool and its set
    queries: list[tuple[int, str]] = []
    pairs: list[list[int]] = []
    positives: list[int] = []

    def enter(number: int, text: str) -> int:
        return entered.setdefault(text, (len(entered), number))[0]

    for place, (number, query) in enumerate(chosen):
        queries.append((number, query))
        same = [dev[number][row] for row in rows[number, query]]
        found = [
            enter(number, passage_text(dev[number], each, contract)) for example in same for each in example.positives
        ]
        positives.append(found[0])
        pairs.extend([place, each] for each in dict.fromkeys(found))
        for each in itertools.chain.from_iterable(example.negatives for example in same):
            enter(number, passage_text(dev[number], each, contract))
    for number, text in _fillers(dev, others, train, rng, contract):
        if len(entered) >= config.dev_passages:
            break
        enter(number, text)
    passages = [(number, text) for text, (_, number) in entered.items()]
    return Pool(queries, passages, torch.tensor(pairs).T, torch.tensor(positives))


def _fillers(
    dev: Sequence[ExampleSet],
    others: Sequence[tuple[int, int]],
    train: Sequence[ExampleSet],
    rng: np.random.Generator,
    contract: Contract,
) -> Iterator[tuple[int, str]]:
    for number, row in others:
        for each in dev[number][row].positives:
            yield number, passage_text(dev[number], each, contract)
    # As often as there are examples, so that a small set, all of whose passages are in, ends the search.
    for _ in range(sum(map(len, train))):
        number = int(rng.integers(len(train)))
        examples = train[number]
        example = examples[int(rng.integers(len(examples)))]
        passages = (*example.positives, *example.negatives)
        yield min(number, len(dev) - 1), passage_text(examples, passages[int(rng.integers(len(passages)))], contract)


class DevMeasure:
    """Measures a module on a pool.

    Args:
        pool: Queries and passages.
        source: Turns them into forward passes.
        config: The temperature of the loss.
    """

    def __init__(self, pool: Pool, source: ContrastSource, config: FinetuneConfig) -> None:
        self.pool, self.temperature = pool, config.temperature
        self._passes = source.cut(pool.queries, pool.passages)

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> dict[str, float]:
        """Returns the mean loss, nDCG@10 and MRR@10. Every process computes all of it."""
        device = next(module.parameters()).device
        parts = [module(to_device(batch, device), None).float().cpu() for batch in self._passes]
        vectors = torch.empty(sum(map(len, parts)), parts[0].shape[1])
        vectors[torch.cat([batch["rows"] for batch in self._passes])] = torch.cat(parts)
        count = len(self.pool.queries)
        queries, passages = vectors[:count], vectors[count:]
        loss = InfoNCE(self.pool.positives, self.temperature, self.pool.relevant)
        sums = np.zeros(3)
        for rows in row_slices(count, len(passages)):
            sums[0] += float(loss(queries[rows], passages, rows))
            sums[1:] += ranked(queries[rows] @ passages.T, self._relevant(rows)).sum(axis=0)
        return dict(zip(NAMES, (sums / count).tolist(), strict=True))

    def _relevant(self, rows: slice) -> list[list[int]]:
        queries, passages = self.pool.relevant
        return [passages[queries == row].tolist() for row in range(rows.start, rows.stop)]


def ranked(scores: Tensor, relevant: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Returns nDCG@10 and MRR@10 of each query, float64 [Q, 2]; of equal scores, the relevant passage comes last.

    Args:
        scores: [Q, P].
        relevant: The passages that are relevant to each query, one at least.
    """
    found = np.zeros((len(scores), 2))
    for row, own in enumerate(relevant):
        best = scores[row, list(own)].sort(descending=True).values
        others = scores[row].clone()
        others[list(own)] = -math.inf
        above = (others[None, :] >= best[:, None]).sum(dim=1)
        ranks = [place + int(count) for place, count in enumerate(above, start=1) if place + int(count) <= DEPTH]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(own), DEPTH) + 1))
        found[row] = sum(1 / math.log2(rank + 1) for rank in ranks) / ideal, 1 / ranks[0] if ranks else 0.0
    return found
