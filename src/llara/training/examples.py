"""What a training batch is drawn from: queries with a positive, hard negatives, and a teacher's scores."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llara.config import FinetuneConfig
from llara.contract import Contract
from llara.data.collections import refuse_splits
from llara.data.lines import check_readable
from llara.data.store import ExampleSet, SetSource, TrainingData, prepare_examples
from llara.pairs import PairContract
from llara.training.chunks import fingerprint
from llara.training.mixture import Mixture


class Drawn(NamedTuple):
    """One example as a batch uses it; titles are joined to their texts.

    set: the number of its set. passages: a positive, then hard negatives. relevant: the texts of all its positives.
    scores: the teacher's, one per passage, or none.
    """

    set: int
    query: str
    passages: tuple[str, ...]
    relevant: tuple[str, ...]
    scores: tuple[float, ...]


class ExampleDraw:
    """Draws batches of examples as a function of their number; a positive and negatives anew in every pass.

    Args:
        sets: The examples.
        weights: How often each set counts.
        config: Batch size, seed, mixing, negatives.
        contract: How a title is joined to its text.
        world: Processes that train together; see `Mixture`.
    """

    def __init__(
        self,
        sets: Sequence[ExampleSet],
        weights: Sequence[int],
        config: FinetuneConfig,
        contract: Contract | PairContract,
        world: int = 1,
    ) -> None:
        self.sets, self.config, self.contract = sets, config, contract
        self.mixture = Mixture(
            [len(examples) for examples in sets],
            config.batch_size,
            config.seed,
            weights,
            config.mixing,
            homogeneous=config.homogeneous,
            world=world,
        )

    @property
    def per_pass(self) -> float:
        """Batches that hold as many examples as there are."""
        return self.mixture.per_pass

    def draw(self, number: int) -> list[Drawn]:
        """Returns the examples of a batch; queries that have fewer negatives than asked for use what they have."""
        rng = np.random.default_rng([self.config.seed, number, 2])
        picked = self.mixture.batch(number)
        return [self._draw(part.set, int(row), rng) for part in picked for row in part.rows]

    def queries(self, number: int) -> list[str]:
        """Returns the queries of a batch alone."""
        return [self.sets[part.set][int(row)].query for part in self.mixture.batch(number) for row in part.rows]

    def _draw(self, number: int, row: int, rng: np.random.Generator) -> Drawn:
        examples = self.sets[number]
        example = examples[row]
        texts = {each: passage_text(examples, each, self.contract) for each in example.positives}
        best = int(rng.integers(len(example.positives)))
        count = min(self.config.negatives, len(example.negatives))
        others = rng.choice(len(example.negatives), size=count, replace=False) if count else np.empty(0, dtype=np.int64)
        negatives = [passage_text(examples, example.negatives[int(each)], self.contract) for each in others]
        scores: tuple[float, ...] = ()
        if example.positive_scores:
            scores = (example.positive_scores[best], *(example.negative_scores[int(each)] for each in others))
        passages = (texts[example.positives[best]], *negatives)
        return Drawn(number, example.query, passages, tuple(texts.values()), scores)


def passage_text(examples: ExampleSet, number: int, contract: Contract | PairContract) -> str:
    """Returns a passage of a set as a model reads it, its title joined to its text."""
    passage = examples.passage(number)
    return contract.join_title(passage.title, passage.text)


class Opened(NamedTuple):
    """The sets of a run: those to train on, with how often each counts, and those to measure on."""

    train: list[ExampleSet]
    weights: list[int]
    dev: list[ExampleSet]


def open_examples(folder: Path, config: FinetuneConfig) -> Opened:
    """Reads and checks the examples into `folder`, unless that is done, and opens them; see `prepare_examples`.

    A path of `--train` that is given several times is one set that counts several times.
    """
    counted = Counter(config.train)
    sets = [SetSource(path, config.split, config.distill != "none") for path in counted]
    sets += [SetSource(path, config.dev_split) for path in dict.fromkeys(config.dev)]
    found = prepare_examples(folder, TrainingData(sets, config.corpus, config.queries))
    return Opened(found[: len(counted)], list(counted.values()), found[len(counted) :])


def check_data(config: FinetuneConfig) -> None:
    """Refuses, before the model is loaded, what the paths alone give away; their rows are checked by `open_examples`.

    Raises:
        DataError: A path that is missing or unreadable.
        ConfigError: A split of what has no splits.
    """
    queries = () if config.queries is None else (config.queries,)
    for path in (*config.train, *config.dev, *config.corpus, *queries):
        check_readable(path)
    refuse_splits("--split", config.split, FinetuneConfig.split, config.train)
    refuse_splits("--dev-split", config.dev_split, FinetuneConfig.dev_split, config.dev)


def data_identity(config: FinetuneConfig) -> dict[str, str]:
    """Returns what stands for the content of all files that examples are read from."""
    data = {"train": fingerprint(config.train)}
    if config.corpus:
        data["corpus"] = fingerprint(config.corpus)
    if config.queries is not None:
        data["queries"] = fingerprint((config.queries,))
    if config.dev:
        # They choose among the steps, so how often does decide the weights here.
        data |= {"dev": fingerprint(config.dev), "measure_every": str(config.measure_every)}
    return data
