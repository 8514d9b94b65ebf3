"""Batches of chunks: every chunk once per pass, cut by tokens, the same for the same number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara.model import EmbeddingModel
from llara.training.chunks import ChunkStore, prepare_chunks
from llara.training.objective import AdaptModule, Plan, Prompts
from llara.training.source import ChunkSource
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
    return prepare_chunks(folder / "chunks", [write_text(folder / "corpus.jsonl", documents=30)], model, 16, 4)


def prompts_of(model: EmbeddingModel) -> Prompts:
    template = model.bind()
    return Prompts(template.passage, template.query, model.pad_id, tuple(model.tokenizer.all_special_ids))


def source_of(
    model: EmbeddingModel, store: ChunkStore, plan: Plan = BOTH, budget: int = 10**9, **changes: Any
) -> ChunkSource:
    config = adapt_config(Path("base"), Path("corpus"), Path("out"), **changes)
    return ChunkSource(store, prompts_of(model), plan, config, budget)


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
    assert source_of(model, store, steps=None, epochs=0.0).batches == 1


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


def test_a_batch_is_described_row_by_row(model: EmbeddingModel, store: ChunkStore) -> None:
    source = source_of(model, store)
    assert len(source.describe(3)) == len(source.rows(3))
    assert len(set(source.describe(3))) == len(np.unique(source.rows(3)))
