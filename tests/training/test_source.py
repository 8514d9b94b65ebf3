"""Batches of chunks: every chunk once per pass, cut by tokens, the same for the same number."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llara.contract import Contract
from llara.model import EmbeddingModel
from llara.training.chunks import ChunkStore
from llara.training.objective import AdaptModule, Plan, Prompts
from llara.training.prepare import prepare_chunks
from llara.training.source import ChunkSource, HeldOut, hold_out
from llara.training.workspace import identity_of
from tests import tiny
from tests.training.helpers import adapt_config, write_text

BOTH = Plan("ebae+ebar", True, 1.0, 0.0)
KINDS = ("shared", "self", "next", "text")


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model()


@pytest.fixture(scope="module")
def store(model: EmbeddingModel, tmp_path_factory: pytest.TempPathFactory) -> ChunkStore:
    folder = tmp_path_factory.mktemp("store")
    config = adapt_config(Path("base"), write_text(folder / "corpus.jsonl", documents=30), folder / "out")
    return prepare_chunks(folder / "chunks", config, model)


def prompts_of(model: EmbeddingModel) -> Prompts:
    template = model.bind()
    return Prompts(template.passage, template.query, model.pad_id, tuple(model.tokenizer.all_special_ids))


def source_of(
    model: EmbeddingModel,
    store: ChunkStore,
    plan: Plan = BOTH,
    budget: int = 10**9,
    weights: npt.NDArray[np.float32] | None = None,
    **changes: Any,
) -> ChunkSource:
    config = adapt_config(Path("base"), Path("corpus"), Path("out"), **({"held_out": 0} | changes))
    return ChunkSource(store, prompts_of(model), plan, config, budget, weights)


def rows_of(source: ChunkSource, first: int, last: int) -> list[int]:
    return [row for number in range(first, last) for row in source.rows(number).tolist()]


def test_every_pass_over_the_corpus_takes_every_chunk_once(model: EmbeddingModel, store: ChunkStore) -> None:
    source = source_of(model, store)
    per_pass = source.batches_per_pass
    assert per_pass == -(-len(store) // 4)
    for number in range(3):
        assert sorted(rows_of(source, number * per_pass, (number + 1) * per_pass)) == list(range(len(store)))


def test_max_chunks_takes_a_seeded_sample(model: EmbeddingModel, store: ChunkStore) -> None:
    per_pass = -(-len(store) // 4)
    assert source_of(model, store, max_chunks=10_000).batches_per_pass == per_pass
    first, again, other = (source_of(model, store, max_chunks=8, seed=seed) for seed in (0, 0, 1))
    assert first.batches_per_pass == 2
    assert rows_of(first, 0, 8) == rows_of(again, 0, 8)
    sample = set(rows_of(first, 0, 2))
    assert len(sample) == 8 and sample == set(rows_of(first, 2, 4))
    assert sample != set(rows_of(other, 0, 2))


@pytest.mark.parametrize("plan", [BOTH, Plan("ebae+ebar", False, 1.0, 0.5), Plan("lm", True, 1.0, 0.0)])
def test_passes_hold_the_batch_within_the_budget(model: EmbeddingModel, store: ChunkStore, plan: Plan) -> None:
    budget = 100
    source = source_of(model, store, plan, budget, batch_size=16)
    entire = source_of(model, store, plan, batch_size=16)
    for number in range(source.batches_per_pass):
        passes = source.passes(number)
        assert len(passes) > 1
        for each in passes:
            rows, width = next(each[kind].shape for kind in KINDS if kind in each)
            assert rows * width <= budget or rows == 1
        (single,) = entire.passes(number)
        assert torch.equal(sum(each["counts"] for each in passes), single["counts"])
        lengths = torch.cat([each["text_lengths"] for each in passes])
        assert sorted(lengths.tolist()) == sorted(single["text_lengths"].tolist())


def test_passes_are_a_function_of_the_number(model: EmbeddingModel, store: ChunkStore) -> None:
    forwards = source_of(model, store, budget=200)
    expected = {number: forwards.passes(number) for number in range(6)}
    backwards = source_of(model, store, budget=200)
    for number in reversed(range(6)):
        for one, other in zip(expected[number], backwards.passes(number), strict=True):
            assert torch.equal(one["shared"], other["shared"])
            assert torch.equal(one["next_ids"], other["next_ids"])


def test_the_batches_of_a_run_are_those_of_its_epochs(model: EmbeddingModel, store: ChunkStore) -> None:
    per_pass = source_of(model, store).batches_per_pass
    assert source_of(model, store, steps=5).batches is None
    assert source_of(model, store, steps=None, epochs=2.5).batches == -(-5 * per_pass // 2)
    assert source_of(model, store, steps=None, epochs=0.001).batches == 1


@pytest.mark.parametrize("objective", ["ebae+ebar", "ebae", "ebar", "lm"])
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_pass_counts_nothing_and_has_a_graph(
    store: ChunkStore, objective: Any, one_pass: bool, bos: bool
) -> None:
    model = tiny.model(words=tiny.tokenizer(bos=bos, adds_bos=bos))
    plan = Plan(objective, one_pass, 1.0, 0.5 if objective == "ebae" else 0.0)
    source = source_of(model, store, plan)
    batch = source.empty()
    assert batch["counts"].tolist() == [0, 0, 0]
    loss, sums = AdaptModule(model, source.prompts, plan)(batch, torch.tensor([4, 4, 4]))
    assert float(loss.detach()) == 0.0 and sums.tolist() == [0.0, 0.0, 0.0]
    loss.backward()
    gradients = [weight.grad for weight in model.lm.parameters() if weight.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_a_batch_is_described_by_its_documents(model: EmbeddingModel, store: ChunkStore) -> None:
    source = source_of(model, store)
    assert source.describe(3) == store.ids(source.rows(3))
    assert len(source.describe(3)) == 4 and set(source.describe(3)) <= {f"d{number}" for number in range(30)}


def test_token_weights_reach_the_targets(model: EmbeddingModel, store: ChunkStore) -> None:
    weights = np.zeros(len(model.tokenizer), dtype=np.float32)
    token = int(store[int(source_of(model, store).rows(0)[0])].text[0])
    weights[token] = 2.0
    for batch in source_of(model, store, weights=weights, held_out=3).held_out() + source_of(
        model, store, weights=weights
    ).passes(0):
        assert set(batch["self_ids"].tolist()) <= {token}
    assert source_of(model, store, weights=weights).passes(0)[0]["self_ids"].tolist()


# What is held out ---------------------------------------------------------------------------------------------------


class Documents(ChunkStore):
    """A store of documents of so many chunks each, and nothing else."""

    def __init__(self, *sizes: int) -> None:
        self.documents, self._ends = len(sizes), np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def chunks_of(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.stack([self._ends[documents], self._ends[documents + 1]], axis=1)


def chunks_in(out: HeldOut) -> list[int]:
    return [chunk for first, end in out.ranges.tolist() for chunk in range(first, end)]


def test_whole_documents_are_held_out_until_there_are_enough_chunks() -> None:
    sizes = np.random.default_rng(0).integers(0, 5, 400)
    store = Documents(*sizes.tolist())
    starts = np.cumsum([0, *sizes])
    documents = {(int(first), int(end)) for first, end in itertools.pairwise(starts)}
    for count in (1, 10, 60):
        out = hold_out(store, count, seed=1)
        assert {(first, end) for first, end in out.ranges.tolist()} <= documents
        assert count <= out.size < count + 5
        assert len(out.measured) == count and set(out.measured.tolist()) <= set(chunks_in(out))
        assert out.ranges.tolist() == sorted(out.ranges.tolist())
    assert hold_out(store, 10, seed=1).ranges.tolist() == hold_out(store, 10, seed=1).ranges.tolist()
    assert hold_out(store, 10, seed=1).ranges.tolist() != hold_out(store, 10, seed=2).ranges.tolist()


def test_the_chunks_left_are_all_the_others() -> None:
    store = Documents(*np.random.default_rng(1).integers(0, 6, 300).tolist())
    for count in (0, 1, 30):
        out = hold_out(store, count, seed=0)
        left = out.chunks_left(np.arange(len(store) - out.size))
        assert left.tolist() == sorted(set(range(len(store))) - set(chunks_in(out)))


def test_no_more_than_a_tenth_is_held_out() -> None:
    assert hold_out(Documents(*[1] * 1000), 500, seed=0).size == 100
    assert hold_out(Documents(*[3] * 33), 64, seed=0).size == 9
    assert hold_out(Documents(50, 50), 64, seed=0).size == 0
    assert hold_out(Documents(1, 1, 1), 64, seed=0).size == 0
    assert hold_out(Documents(*[80] + [1] * 20), 64, seed=0).size == 10, "the document that is too large is passed over"
    assert hold_out(Documents(*[1] * 1000), 0, seed=0).size == 0


def test_what_is_held_out_is_measured_and_never_trained_on(model: EmbeddingModel, store: ChunkStore) -> None:
    source = source_of(model, store, held_out=5, budget=100)
    out = hold_out(store, 5, seed=42)
    assert 5 <= out.size <= len(store) // 10
    assert source.batches_per_pass == -(-(len(store) - out.size) // 4)
    trained = rows_of(source, 0, source.batches_per_pass)
    assert sorted(trained) == sorted(set(range(len(store))) - set(chunks_in(out)))
    held = {tuple(store[chunk].text.tolist()) for chunk in chunks_in(out)}
    assert not held & {tuple(store[chunk].next_text.tolist()) for chunk in trained}
    assert not set(store.ids(chunks_in(out))) & set(store.ids(trained))
    passes = source.held_out()
    assert len(passes) > 1
    assert int(sum(batch["counts"] for batch in passes)[0]) == 5
    assert source_of(model, store).held_out() == []


def test_a_sample_is_drawn_from_what_is_left(model: EmbeddingModel, store: ChunkStore) -> None:
    source = source_of(model, store, held_out=5, max_chunks=20)
    sample = rows_of(source, 0, source.batches_per_pass)
    assert len(set(sample)) == len(sample) == 20
    assert not set(sample) & set(chunks_in(hold_out(store, 5, seed=42)))


@pytest.mark.parametrize(
    "changes",
    [{"cut": "token"}, {"deduplicate": False}, {"held_out": 0}, {"targets": "idf"}],
)
def test_what_decides_the_batches_is_part_of_a_run(changes: dict[str, Any]) -> None:
    paths = (Path("base"), Path("corpus"), Path("out"))
    one, other = (identity_of(adapt_config(*paths, **each), "adapt", "base", Contract(), {}) for each in ({}, changes))
    assert one != other


def test_the_language_of_the_stop_words_is_part_of_a_run() -> None:
    paths = (Path("base"), Path("corpus"), Path("out"))
    made = [adapt_config(*paths, targets="no-stopwords", language=each) for each in ("english", "german")]
    one, other = (identity_of(each, "adapt", "base", Contract(), {}) for each in made)
    assert one != other
