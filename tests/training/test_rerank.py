"""Training of rerankers: the objective, what a pass holds, what is trained, and what the folder says afterwards."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara.config import FinetuneConfig
from llara.errors import ConfigError, DataError, ModelError
from llara.loading import load_model
from llara.reranker import Reranker, load_reranker
from llara.training.dev import NAMES
from llara.training.dev_lists import ListMeasure
from llara.training.examples import ExampleDraw, open_examples
from llara.training.finetune import finetune
from llara.training.rerank import PairSource, RerankModule
from llara.training.trainer import JobTrainer
from tests import tiny
from tests.tiny_reranker import reranker
from tests.training.helpers import computed, finetune_config, log_lines, record, sentence, weights, write_lines

EXAMPLES, NEGATIVES = 12, 3


def rows() -> list[dict[str, Any]]:
    """Queries of which only training can tell which of their passages is the relevant one."""
    rng = np.random.default_rng(0)
    return [
        {
            "query": f"{sentence(rng, 3)} {number}",
            "pos": [{"title": "sky", "text": f"{sentence(rng, 4 + number)} {number}"}],
            "neg": [f"{sentence(rng, 5 + place * number)}" for place in range(1, NEGATIVES + 1)],
        }
        for number in range(EXAMPLES)
    ]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("pairs") / "train.jsonl", rows())


def settings(base: Path | str, train: Path, output: Path, **changes: Any) -> FinetuneConfig:
    lengths = {"query_length": 20, "passage_length": None, "length": 56}
    return finetune_config(Path(base), train, output, **{"task": "rerank", "temperature": 0.01, **lengths, **changes})


def first(folder: Path) -> float:
    """Returns the share of queries whose relevant passage scores above all others of it."""
    model = Reranker.load(str(folder), device="cpu")
    right = 0
    for row in rows():
        passages = [row["pos"][0], *({"title": "", "text": text} for text in row["neg"])]
        texts, titles = ([each[name] for each in passages] for name in ("text", "title"))
        right += int(model.score([row["query"]] * len(texts), texts, titles).argmax() == 0)
    return right / len(rows())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, train: Path) -> FinetuneConfig:
    folder = tmp_path_factory.mktemp("reranker")
    config = settings(base, train, folder / "out", steps=40, batch_size=6, negatives=3, log_every=10)
    finetune(config)
    return config


def test_training_puts_the_relevant_passage_first(trained: FinetuneConfig) -> None:
    losses = [line["loss_listwise"] for line in log_lines(trained.output)]
    assert losses[-1] < 0.3 * losses[0]
    assert first(trained.output) > 0.9


def test_the_folder_is_a_reranker_with_its_lengths(trained: FinetuneConfig) -> None:
    contract = Reranker.load(str(trained.output), device="cpu", verify=True).contract
    assert (contract.query_length, contract.length, contract.title_separator) == (20, 56, " ")
    assert contract.template.name == "rankllama"
    with pytest.raises(ModelError, match="is a reranker"):
        load_model(load_config(trained.output))


def load_config(folder: Path) -> Any:
    from llara.config import ModelConfig

    return ModelConfig(model=str(folder), device="cpu")


def test_lora_trains_the_head_too_and_is_merged(base: Path, train: Path, tmp_path: Path) -> None:
    config = settings(base, train, tmp_path / "out", steps=30, batch_size=6, lora_rank=4, lora_alpha=16, log_every=10)
    finetune(config)
    torch.manual_seed(config.seed)
    begun = load_reranker(config, for_training=True).lm.state_dict()
    after = weights(config.output)
    assert begun.keys() == after.keys()  # no layer of LoRA is left
    changed = {name for name, value in after.items() if not torch.equal(value, begun[name])}
    assert "score.weight" in changed and "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed and not any("norm" in name for name in changed)
    assert first(config.output) > 0.7


def opened(folder: Path, train: Path, **changes: Any) -> tuple[Reranker, ExampleDraw, FinetuneConfig]:
    config = settings("mini", train, folder / "out", batch_size=5, negatives=3, **changes)
    model = reranker(length=56)
    examples = open_examples(folder / "examples", config)
    return model, ExampleDraw(examples.train, examples.weights, config, model.contract), config


def gradient(model: Reranker, source: PairSource, config: FinetuneConfig) -> tuple[float, list[torch.Tensor]]:
    module = RerankModule(model, config)
    module.zero_grad()
    passes = source.passes(0)
    counts = torch.stack([batch["counts"] for batch in passes]).sum(dim=0)
    total = 0.0
    for batch in passes:
        loss, sums = module(batch, counts)
        loss.backward()
        total += float(sums)
    return total / int(counts), [value.grad.clone() for value in module.parameters() if value.grad is not None]


def test_the_loss_is_that_of_every_pair_on_its_own(tmp_path: Path, train: Path) -> None:
    model, draw, config = opened(tmp_path, train)
    loss, _ = gradient(model, PairSource(draw, model, config), config)
    drawn = draw.draw(0)
    assert len(drawn) == 5
    expected = 0.0
    for each in drawn:
        pairs = [model.bind().rows([each.query], [passage])[0] for passage in each.passages]
        with torch.no_grad():
            scores = torch.tensor([model.lm(input_ids=torch.tensor([row])).logits.item() for row in pairs])
        expected -= float(scores.log_softmax(dim=0)[0])
    assert loss == pytest.approx(expected / 5, rel=1e-4)


def test_gradients_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path, train: Path) -> None:
    model, draw, _ = opened(tmp_path, train)
    found = []
    for budgets in ({}, {"token_budget": 60, "graph_budget": 0}, {"token_budget": 4096, "graph_budget": 100_000}):
        changed = settings("mini", train, tmp_path / "out", batch_size=5, negatives=3, **budgets)
        source = PairSource(draw, model, changed)
        found.append((len(source.passes(0)), *gradient(model, source, changed)))
    assert [passes for passes, _, _ in found] == [1, 5, 1]
    for _, loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        for one, other in zip(gradients, found[0][2], strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_passes_say_what_they_hold(tmp_path: Path, train: Path) -> None:
    data = write_lines(tmp_path / "some.jsonl", [{**row, "neg": row["neg"][: n % 3]} for n, row in enumerate(rows())])
    model, draw, config = opened(tmp_path, data, graph_budget=200)
    source = PairSource(draw, model, config)
    for number in range(3):
        passes, drawn = source.passes(number), draw.draw(number)
        lists = [
            [batch["rows"][row] for row in line if row >= 0] for batch in passes for line in batch["lists"].tolist()
        ]
        wanted = [each for each in drawn if len(each.passages) > 1]  # a query without negatives teaches nothing
        assert lists == [model.bind().rows([each.query] * len(each.passages), each.passages) for each in wanted]
        assert sum(int(batch["counts"]) for batch in passes) == len(wanted)
        assert sum(batch["tokens"] for batch in passes) == sum(len(row) for rows in lists for row in rows)
        assert all(batch["cells"] >= batch["tokens"] for batch in passes)
        assert source.describe(number) == [each.query for each in drawn]


def test_a_pass_that_counts_nothing_has_a_graph(tmp_path: Path, train: Path) -> None:
    model, draw, config = opened(tmp_path, train)
    module, empty = RerankModule(model, config), PairSource(draw, model, config).empty()
    loss, sums = module(empty, empty["counts"])
    loss.backward()
    assert loss.item() == 0 and sums.tolist() == [0] and empty["counts"].tolist() == [0]
    assert all(value.grad is not None and not value.grad.any() for value in model.lm.parameters())


def test_a_stopped_run_goes_on_as_if_it_had_not(
    base: Path, train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"steps": 6, "batch_size": 3, "save_every": 2, "lora_rank": 2, "lora_dropout": 0.2}
    finetune(settings(base, train, tmp_path / "whole", **changes))
    plain = JobTrainer.training_step

    def stop(self: JobTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as stopped:
        stopped.setattr(JobTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings(base, train, tmp_path / "out", **changes))
    result = finetune(settings(base, train, tmp_path / "out", **changes))
    assert result.steps == 6 and finetune(settings(base, train, tmp_path / "out", **changes)).reused
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(whole[name].numpy().tobytes() == again[name].numpy().tobytes() for name in whole)


def test_a_reranker_may_be_trained_further_and_a_retriever_into_one(
    trained: FinetuneConfig, train: Path, tmp_path: Path
) -> None:
    kept = {"query_length": None, "length": None, "steps": 1}
    finetune(settings(trained.output, train, tmp_path / "further", **kept))
    assert Reranker.load(str(tmp_path / "further"), device="cpu").contract.length == 56
    tiny.model().save(tmp_path / "retriever")
    finetune(settings(tmp_path / "retriever", train, tmp_path / "made", template="rankllama-v1", steps=1))
    assert Reranker.load(str(tmp_path / "made"), device="cpu").contract.template.name == "rankllama-v1"
    with pytest.raises(ModelError, match="is a reranker"):
        finetune(finetune_config(trained.output, train, tmp_path / "no"))


def test_what_a_reranker_cannot_be_trained_on_is_named(base: Path, tmp_path: Path) -> None:
    bare = write_lines(tmp_path / "bare.jsonl", [{**row, "neg": []} for row in rows()])
    with pytest.raises(DataError, match=r"bare\.jsonl: no example has a hard negative, .* llara mine"):
        finetune(settings(base, bare, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"a length of 25 tokens leaves no room for a document"):
        finetune(settings(base, bare, tmp_path / "out", length=25))
    with pytest.raises(ConfigError, match=r"--template: 'paper' is neither a file nor a reranker's template"):
        finetune(settings(base, bare, tmp_path / "out", template="paper"))
    with pytest.raises(ConfigError) as caught:
        settings(
            base, bare, tmp_path, distill="kl", negatives=0, passage_length=9, matryoshka_dims=(2,), dev_passages=9
        )
    for said in ("--distill", "--negatives", "--passage-length", "--matryoshka-dims", "--dev-passages"):
        assert f"{said}: " in str(caught.value)
    with pytest.raises(ConfigError, match="--length: goes with --task rerank"):
        finetune_config(base, bare, tmp_path, length=30)


def test_the_preset_says_what_was_published_and_trains_a_llama(root: Path, base: Path, tmp_path: Path) -> None:
    values = tomllib.loads((root / "recipes" / "rankllama_finetune.toml").read_text(encoding="utf-8"))
    maps = tuple(values.pop("lora_modules"))
    assert set(maps) == {"q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"}
    published = {"task": "rerank", "lora_rank": 32, "lora_alpha": 64, "lora_dropout": 0.1, "negatives": 15}
    assert published.items() <= values.items()
    few = write_lines(tmp_path / "mined.jsonl", rows()[:4])
    made = {"model": str(base), "train": (few,), "output": tmp_path / "out", "device": "cpu", "offline": True}
    assert finetune(FinetuneConfig(**{**values, "lora_modules": maps, **made, "batch_size": 2})).steps == 2
    contract = Reranker.load(str(tmp_path / "out"), device="cpu").contract
    assert (contract.template.name, contract.query_length, contract.length) == ("rankllama", 32, 228)


# Held-out examples ----------------------------------------------------------------------------------------------------


def dev_rows() -> list[dict[str, Any]]:
    """One query stands in two rows, of which one calls relevant what the other does not; one query has no negative."""
    made = [
        {"query": f"why {n}", "pos": [f"the sky is blue {n}"], "neg": [f"read {n}", f"a file {n}"]} for n in range(3)
    ]
    made.append({"query": "why 0", "pos": ["the air", "a file 0"], "neg": ["light"]})
    return [*made, {"query": "alone", "pos": ["nothing to compare"]}]


def test_a_measurement_equals_single_scores_and_their_ranks(tmp_path: Path, train: Path) -> None:
    dev = write_lines(tmp_path / "dev.jsonl", dev_rows())
    config = settings("mini", train, tmp_path / "out", dev=(dev,), dev_queries=9)
    model = reranker(query_length=20, length=56)
    sets = open_examples(tmp_path / "examples", config).dev
    found = ListMeasure(sets, model, config)()
    few = ListMeasure(sets, model, replace(config, dev_queries=3))()
    assert few == found, "the query without a negative takes no other's place"
    expected = np.zeros(3)
    lists = {
        "why 0": (["the sky is blue 0", "the air", "a file 0"], ["read 0", "light"]),
        **{f"why {n}": ([f"the sky is blue {n}"], [f"read {n}", f"a file {n}"]) for n in (1, 2)},
    }
    for query, (relevant, others) in lists.items():
        scores = [float(model.score([query], [text])[0]) for text in (*relevant, *others)]
        order = sorted(range(len(scores)), key=lambda each: -scores[each])
        gains = [1 / np.log2(rank + 2) for rank, each in enumerate(order) if each < len(relevant)]
        best = sum(1 / np.log2(rank + 2) for rank in range(len(relevant)))
        first_rank = next(rank for rank, each in enumerate(order, 1) if each < len(relevant))
        against = np.array([scores[0], *scores[len(relevant) :]])
        loss = np.log(np.exp(against - against[0]).sum())
        expected += [loss, sum(gains) / best, 1 / first_rank]
    assert [found[name] for name in NAMES] == pytest.approx((expected / 3).tolist(), rel=1e-4)


def test_the_best_step_is_kept_and_patience_ends_a_run(
    tmp_path: Path, base: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter((0.2, 0.6, 0.4, 0.3, 0.9))
    seen: list[dict[str, torch.Tensor]] = []

    def measured(self: ListMeasure) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in self._model.lm.state_dict().items()})
        return {"dev_ndcg": next(values)}

    monkeypatch.setattr(ListMeasure, "__call__", measured)
    config = settings(base, train, tmp_path / "out", steps=10, dev=(train,), measure_every=2, patience=2)
    result = finetune(config)
    assert (result.steps, result.log["best_step"], result.log["dev_ndcg"]) == (8, 4, 0.6)
    saved = weights(config.output)
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)


def test_a_measured_run_that_was_killed_goes_on_as_if_it_had_not_been(
    tmp_path: Path, base: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"steps": 6, "measure_every": 2, "save_every": 2, "log_every": 2, "patience": 2, "lora_rank": 2}
    whole, broken = (
        settings(base, train, tmp_path / name, dev=(train,), learning_rate=1e-2, **more) for name in ("a", "b")
    )
    reference = finetune(whole)
    assert 0 < reference.log["dev_ndcg"] <= 1
    step = JobTrainer.training_step

    def stops(self: Any, *rest: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobTrainer, "training_step", stops)
        finetune(broken)
    resumed = finetune(broken)
    assert (resumed.steps, resumed.log) == (reference.steps, reference.log)
    assert record(broken.output / "model.safetensors") == record(whole.output / "model.safetensors")
    assert computed(broken.output) == computed(whole.output)


def test_held_out_queries_without_negatives_are_nothing_to_measure_on(tmp_path: Path, base: Path, train: Path) -> None:
    dev = write_lines(tmp_path / "dev.jsonl", [{"query": "why", "pos": ["the sky"], "neg": []}])
    with pytest.raises(DataError, match=r"dev\.jsonl: no held-out query has a hard negative"):
        finetune(settings(base, train, tmp_path / "out", steps=2, dev=(dev,)))
