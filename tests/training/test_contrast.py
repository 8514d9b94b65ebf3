"""The contrastive objective on whole batches: passes, comparisons, terms of the loss, and their gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llara.config import FinetuneConfig
from llara.data.store import ExampleSet
from llara.errors import ConfigError
from llara.losses.contrast import relevant_pairs
from llara.model import EmbeddingModel
from llara.training.contrast import ContrastModule, ContrastSource, matryoshka_of
from llara.training.examples import Drawn
from llara.training.trainer import Batch
from tests import tiny
from tests.reference import losses as slow
from tests.training.examples import draw_of, row, sets_of, settings
from tests.training.helpers import WORDS

COUNTS = torch.tensor([4, 4])


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ExampleSet]:
    """One set of scored examples, with up to three negatives of different lengths."""
    rows = []
    for i in range(8):
        negatives = [f"a file {' '.join(WORDS[j : j + i + 1])} {i}" for j in range(i % 4)]
        scores = {"pos_scores": [3.0 + i, 2.0], "neg_scores": [float(j) for j in range(i % 4)]}
        rows.append(row(f"why {WORDS[i]} {i}", [f"the sky {WORDS[i]} {i}", f"read {i}"], negatives, **scores))
    return sets_of(tmp_path_factory.mktemp("sets"), rows)


def source_of(sets: list[ExampleSet], model: EmbeddingModel, **changes: Any) -> ContrastSource:
    return ContrastSource(draw_of(sets, model.contract, **changes), model, settings(**changes))


def lengths_of(model: EmbeddingModel, config: FinetuneConfig) -> EmbeddingModel:
    """The same model with the configuration's lengths."""
    contract = model.contract.with_lengths(config.query_length, config.passage_length)
    return EmbeddingModel(model.lm, model.tokenizer, contract, "tiny", "tiny")


def rows_of(passes: list[Batch]) -> list[list[int]]:
    """The token ids of queries, then passages."""
    found = {}
    for batch in passes:
        for place, ids, length in zip(batch["rows"].tolist(), batch["ids"], batch["lengths"].tolist(), strict=True):
            found[place] = ids[:length].tolist()
    assert sorted(found) == list(range(len(found)))
    return [found[place] for place in range(len(found))]


def gradients(module: ContrastModule) -> Tensor:
    return torch.cat([value.grad.flatten() for value in module.parameters() if value.grad is not None]).clone()


def trained_step(module: ContrastModule, passes: list[Batch], counts: Tensor = COUNTS) -> tuple[float, Tensor, Tensor]:
    """Returns the loss, the sums and the gradient of a batch, as the trainer comes to them."""
    module.zero_grad()
    module.prepare(passes, module)
    loss, sums = 0.0, torch.zeros(len(module.parts))
    for batch in passes:
        part, some = module(batch, counts)
        part.backward()
        loss, sums = loss + float(part.detach()), sums + some
    return loss, sums, gradients(module)


# Passes -------------------------------------------------------------------------------------------------------------


def test_passes_hold_every_row_once_within_the_budget(sets: list[ExampleSet], model: EmbeddingModel) -> None:
    whole = source_of(sets, model, token_budget=10**6).passes(0)
    passes = source_of(sets, model, token_budget=60).passes(0)
    assert len(whole) == 1 < len(passes)
    assert rows_of(passes) == rows_of(whole)
    for batch in passes:
        count, width = batch["ids"].shape
        assert count * width <= 60 or count == 1
        assert batch["cells"] == count * width
        assert batch["tokens"] == int(batch["lengths"].sum())
        assert len(batch["slots"]) == count
    assert [batch["counts"].tolist() for batch in passes] == [[4], *[[0]] * (len(passes) - 1)]
    assert torch.equal(passes[0]["passage_keys"], whole[0]["passage_keys"])


def test_rows_are_queries_then_passages_in_the_template(sets: list[ExampleSet], model: EmbeddingModel) -> None:
    source = source_of(sets, model, negatives=2)
    passes, drawn = source.passes(3), source._draw.draw(3)
    texts = [each.query for each in drawn], [text for each in drawn for text in each.passages]
    expected = [
        *source.template.encode(texts[0], "query", model.contract.query_length),
        *source.template.encode(texts[1], "passage", model.contract.passage_length),
    ]
    assert rows_of(passes) == expected
    starts = passes[0]["positives"].tolist()
    assert [texts[1][start] for start in starts] == [each.passages[0] for each in drawn]
    assert source.describe(3) == texts[0]


def test_prompts_stand_in_front_of_their_sets_texts(tmp_path: Path, model: EmbeddingModel) -> None:
    sets = sets_of(tmp_path, [row("qa", ["pa"])], [row("qb", ["pb"])])
    template = model.bind()
    one, two = "one: ", "two: "
    for prompts, expected in (((), ("", "")), ((one,), (one, one)), ((one, two), (one, two))):
        changes = {"query_prompts": prompts, "passage_prompts": prompts, "train": (Path("a"), Path("b"))}
        source = source_of(sets, model, batch_size=1, **changes)
        seen = set()
        for number in range(12):
            query, passage = rows_of(source.passes(number))
            part = source._draw.draw(number)[0].set
            seen.add(part)
            text = f"{expected[part]}q{'ab'[part]}", f"{expected[part]}p{'ab'[part]}"
            assert query == template.encode([text[0]], "query", 64)[0]
            assert passage == template.encode([text[1]], "passage", 160)[0]
        assert seen == {0, 1}


def test_an_empty_pass_counts_nothing_and_reaches_what_a_batch_reaches(
    sets: list[ExampleSet], model: EmbeddingModel
) -> None:
    source, module = source_of(sets, model), ContrastModule(model, settings())
    empty = source.empty()
    assert (empty["counts"].tolist(), empty["tokens"], empty["cells"]) == ([0], 0, 0)
    loss, sums = module(empty, COUNTS[:1])
    assert (float(loss.detach()), sums.tolist()) == (0.0, [0.0])
    loss.backward()
    reached = {name for name, value in module.named_parameters() if value.grad is not None}
    passes = source.passes(0)
    expected = trained_step(module, passes)
    assert reached == {name for name, value in module.named_parameters() if value.grad is not None}
    # Behind a batch's own passes, as where several processes must have the same number of them.
    loss_after, sums_after, found = trained_step(module, [*passes, empty])
    assert loss_after == pytest.approx(expected[0])
    assert torch.equal(found, expected[2])
    assert torch.equal(sums_after, expected[1])


# Comparisons --------------------------------------------------------------------------------------------------------


def excluded_of(passes: list[Batch]) -> set[tuple[int, int]]:
    first = passes[0]
    pairs = relevant_pairs(first["query_keys"], first["relevant"], first["passage_keys"])
    return {(query, passage) for query, passage in pairs.T.tolist()}


def test_copies_of_a_positive_are_no_negatives(tmp_path: Path, model: EmbeddingModel) -> None:
    rows = [
        row("qa", ["same", "other"]),
        row("qb", ["same"]),
        row("qc", ["else"], ["same", "other"]),
        row("qa", ["third"]),  # the same query a second time: its positives count for both
    ]
    source = source_of(sets_of(tmp_path, rows), model)
    relevant = {"qa": {"same", "other", "third"}, "qb": {"same"}, "qc": {"else"}}
    for number in range(6):
        drawn = source._draw.draw(number)
        passages = [text for each in drawn for text in each.passages]
        expected = {
            (query, passage)
            for query, each in enumerate(drawn)
            for passage, text in enumerate(passages)
            if text in relevant[each.query]
        }
        assert excluded_of(source.passes(number)) == expected


def test_pairs_of_keys_equal_a_loop_over_them() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        queries, passages = (torch.randint(-3, 3, (size,), generator=generator) for size in (5, 9))
        relevant = torch.randint(-3, 3, (7, 2), generator=generator)
        expected = {
            (place, other)
            for place, query in enumerate(queries.tolist())
            for other, passage in enumerate(passages.tolist())
            if [query, passage] in relevant.tolist()
        }
        found = relevant_pairs(queries, relevant, passages)
        assert found.shape == (2, len(expected))
        assert {(query, passage) for query, passage in found.T.tolist()} == expected


def test_nothing_is_left_to_tell_apart_where_all_passages_are_the_same(tmp_path: Path, model: EmbeddingModel) -> None:
    source = source_of(sets_of(tmp_path, [row("q", ["same"]), row("r", ["same"])]), model, batch_size=2)
    loss, sums, _ = trained_step(ContrastModule(model, settings()), source.passes(0))
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert float(sums[0]) == pytest.approx(0.0, abs=1e-6)


# Losses -------------------------------------------------------------------------------------------------------------


def expected_loss(
    model: EmbeddingModel, drawn: list[Drawn], passes: list[Batch], config: FinetuneConfig
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch of which every row is encoded alone, and its terms."""
    vectors = torch.cat([model.embed([ids], 1) for ids in rows_of(passes)])
    queries, passages = vectors[: len(drawn)], vectors[len(drawn) :]
    positives = passes[0]["positives"].tolist()
    own = [list(range(start, start + len(each.passages))) for start, each in zip(positives, drawn, strict=True)]
    scores = [list(each.scores) for each in drawn]

    def contrast(queries: Tensor, passages: Tensor) -> Tensor:
        return slow.info_nce(
            queries,
            passages,
            positives,
            config.temperature,
            excluded_of(passes),
            config.margin,
            config.relative_margin,
        )

    def distill(queries: Tensor, passages: Tensor) -> Tensor:
        if config.distill == "margin-mse":
            return slow.margin_mse(queries, passages, own, scores, config.temperature)
        return slow.kl_divergence(queries, passages, own, scores, config.temperature, config.teacher_temperature)

    dims, weights = matryoshka_of(config, model.dim)
    terms = []
    if config.contrast_weight:
        terms.append((config.contrast_weight, slow.matryoshka(contrast, queries, passages, dims, weights)))
    if config.distill != "none":
        terms.append((config.distill_weight, slow.matryoshka(distill, queries, passages, dims, weights)))
    return sum(weight * term for weight, term in terms) / 4, [term for _, term in terms]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5, "negatives": 3},
        {"margin": 0.1, "relative_margin": 0.3},
        {"distill": "kl", "teacher_temperature": 2.0, "distill_weight": 0.5, "negatives": 3},
        {"distill": "margin-mse", "contrast_weight": 0.0, "temperature": 1.0},
        {"matryoshka_dims": (8, 3), "matryoshka_weights": (0.5, 2.0)},
        {"matryoshka_dims": (16,), "distill": "kl"},
    ],
    ids=lambda changes: "+".join(changes) or "plain",
)
@pytest.mark.parametrize("budgets", [(10**6, None), (48, 0), (48, 100), (48, 10**6)], ids=str)
def test_loss_and_gradient_are_those_of_single_encodings(
    sets: list[ExampleSet], changes: dict[str, Any], budgets: tuple[int, int | None]
) -> None:
    config = settings(token_budget=budgets[0], graph_budget=budgets[1], **changes)
    model = lengths_of(tiny.model(), config)
    source = ContrastSource(draw_of(sets, model.contract, **changes), model, config)
    passes, module = source.passes(1), ContrastModule(model, config)
    loss, sums, found = trained_step(module, passes)
    module.zero_grad()
    total, terms = expected_loss(model, source._draw.draw(1), passes, config)
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-4)
    assert sums.tolist() == pytest.approx([float(term.detach()) for term in terms], rel=1e-4)
    assert [part.name for part in module.parts] == list(source.names)
    expected = gradients(module)
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_kept_graphs_change_nothing(sets: list[ExampleSet], model: EmbeddingModel) -> None:
    passes = source_of(sets, model, token_budget=48).passes(0)
    made = [trained_step(ContrastModule(model, settings(graph_budget=budget)), passes)[2] for budget in (0, 60, 10**6)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_kept_graphs_change_nothing_with_dropout(sets: list[ExampleSet]) -> None:
    """A pass that is encoded twice drops the units that it dropped before: a whole graph would have dropped them."""
    model = tiny.model(attention_dropout=0.3)
    passes = source_of(sets, model, token_budget=48).passes(0)

    def gradient(graph_budget: int, seed: int) -> Tensor:
        module = ContrastModule(model, settings(graph_budget=graph_budget))
        model.lm.train()
        torch.manual_seed(seed)
        return trained_step(module, passes)[2]

    whole = gradient(10**6, 0)
    assert not torch.equal(whole, gradient(10**6, 1)), "dropout is on"
    for budget in (0, 60):
        found = gradient(budget, 0)
        assert float((found - whole).norm() / whole.norm()) < 1e-6


def test_a_loss_that_is_no_number_shows(sets: list[ExampleSet]) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.lm.get_input_embeddings().weight.fill_(float("nan"))
    loss, _, _ = trained_step(ContrastModule(model, settings()), source_of(sets, model, token_budget=60).passes(0))
    assert loss != loss


def test_dimensions_beyond_the_models_are_refused() -> None:
    assert matryoshka_of(settings(), 32) == ((32,), (1.0,))
    assert matryoshka_of(settings(matryoshka_dims=(8, 16)), 32) == ((32, 8, 16), (1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match="the model's vectors have 32 dimensions"):
        matryoshka_of(replace(settings(), matryoshka_dims=(8, 32)), 32)
