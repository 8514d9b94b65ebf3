"""Configurations check themselves, and survive the way to TOML and back."""

import tomllib
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from llara import config
from llara.cli.parse import config_class, field_help, parse
from llara.cli.table import COMMANDS, Command
from llara.config import AdaptConfig, EvaluateConfig, FinetuneConfig, IndexConfig, JobConfig, SearchConfig, to_toml
from llara.errors import ConfigError

ODD = 'a "quoted" \\ path\twith\x7f ünïcode \x85\u2028\U0001f600'
VALUES: dict[str, dict[str, Any]] = {
    "demo": {"output": Path(ODD), "fast": True, "seed": 7},
    "adapt": {
        "model": "mini", "corpus": (Path("a b"), Path(ODD)), "output": Path("out"), "steps": 5, "learning_rate": 3e-4,
        "template": ODD, "lora_rank": 4, "lora_modules": ("q_proj", "v_proj"), "report_to": (), "loss_scale": 0.1,
        "offline": True,
    },
    "finetune": {
        "model": "org/name", "train": (Path("a"),), "output": Path("out"), "titles": False, "query_length": 32,
        "temperature": 1e-5, "weight_decay": 0.0, "bos": "yes",
    },
    "encode": {"model": "m", "corpus": (Path("c"),), "output": Path("v"), "vector_dtype": "float16"},
    "index": {"output": Path("i"), "corpus": (Path("c"), Path("d")), "type": "bm25", "k1": 1.2, "verify": True},
    "search": {"query": "-5 degrees: why? 'so' \"then\"", "index": Path("i"), "top_k": 3},
    "rerank": {
        "model": "m", "run": Path("r"), "queries": Path("q"), "corpus": (Path("c"),), "output": Path("o"), "depth": 9,
        "template": "rankllama-v1", "first_stage_weight": 0.25, "add_relevant": Path("t"), "base": "org/name",
    },
    "fuse": {"run": (Path("a"), Path("b")), "output": Path("o"), "weights": (0.5, 2.0), "k": 1.5, "top_k": 5},
    "mine": {"index": Path("i"), "queries": Path("q"), "output": Path("o"), "margin": 0.1, "relative_margin": 0.05},
    "explain": {
        "model": "m", "query": ("-5 degrees?", ODD), "document": ("a",), "compare": "org/name", "show": 3,
        "fold": False, "remove_component": True, "sample": (Path("c"),), "plot": Path("p.svg"),
    },
    "evaluate": {"run": (Path("r1"), Path("r2")), "qrels": Path("q"), "metrics": ("nDCG@10",), "output": Path("o")},
    "convert": {"model": "org/name@v1", "output": Path("o")},
    "verify": {"path": Path("p")},
    "doctor": {"offline": True},
    "plan adapt": {"model": "mini", "corpus": (Path(ODD),), "fleet": "8xH100-80GB", "calibrate": 0.5, "steps": 3},
    "plan encode": {"model": "m", "corpus": (Path("c"),), "output": Path("v"), "sample": 7, "peak_share": 0.5},
    "plan index": {"model": "m", "corpus": (Path("c"),), "type": "flat", "calibrate": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_configuration_survives_toml(command: Command, tmp_path: Path) -> None:
    made = config_class(command)(**VALUES[command.name])
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(made), encoding="utf-8")
    parsed = parse([*command.words, "--config", str(file)])
    assert parsed is not None
    assert parsed.config == made


def test_the_round_trip_covers_every_configuration() -> None:
    assert set(VALUES) == {command.name for command in COMMANDS}
    base = {"JobConfig", "ModelConfig", "TrainConfig"}
    classes = {name for name, value in vars(config).items() if isinstance(value, type) and issubclass(value, JobConfig)}
    assert classes - base == {command.config for command in COMMANDS if ":" not in command.config} - base


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_field_has_help(command: Command) -> None:
    cls = config_class(command)
    texts = field_help(cls)
    assert [field.name for field in fields(cls) if len(texts.get(field.name, "")) < 5] == []


def test_toml_leaves_out_what_is_not_set() -> None:
    text = to_toml(SearchConfig(query="why", index=Path("i")))
    assert "queries" not in tomllib.loads(text)
    assert tomllib.loads(text)["query"] == "why"


def test_toml_is_readable_where_a_path_is_no_text() -> None:
    text = to_toml(IndexConfig(output=Path("i"), corpus=(Path("caf\udce9 \U0001f600"), Path("b")), type="bm25"))
    assert tomllib.loads(text)["corpus"] == ["caf\ufffd \U0001f600", "b"]
    assert [line.partition(" ")[0] for line in text.splitlines() if "is not UTF-8" in line] == ["corpus"]
    text.encode()


CORPUS, OUT = (Path("a"),), Path("o")
ADAPT: dict[str, Any] = {"model": "m", "corpus": CORPUS, "output": OUT}
RERANK: dict[str, Any] = {"model": "m", "run": OUT, "queries": OUT, "output": OUT}


@pytest.mark.parametrize(
    ("make", "values", "problem"),
    [
        (
            AdaptConfig,
            {**ADAPT, "min_chunk_length": 129},
            "--min-chunk-length: 129 is more than --chunk-length 128",
        ),
        (AdaptConfig, {**ADAPT, "chunk_length": 8}, "--min-chunk-length: 16 is more than --chunk-length 8, so"),
        (AdaptConfig, {**ADAPT, "loss_scale": 0.0}, "--loss-scale: 0 leaves nothing to train on without --lm-weight"),
        (
            AdaptConfig,
            {**ADAPT, "targets": "idf", "language": "german"},
            "--language: goes with --targets no-stopwords",
        ),
        (AdaptConfig, {**ADAPT, "epochs": 0.0}, "--epochs: must be above 0, got 0.0"),
        (AdaptConfig, {**ADAPT, "seed": 2**32}, "--seed: must be between 0 and 4294967295, got 4294967296"),
        (AdaptConfig, {**ADAPT, "lora_alpha": 64}, "--lora-alpha: goes with --lora-rank"),
        (AdaptConfig, {**ADAPT, "lora_dropout": 0.0}, "--lora-dropout: goes with --lora-rank"),
        (AdaptConfig, {**ADAPT, "lora_modules": ("q_proj",)}, "--lora-modules: goes with --lora-rank"),
        (AdaptConfig, {**ADAPT, "lora_rank": 4, "lora_alpha": 0}, "--lora-alpha: must be 1 or more, got 0"),
        (AdaptConfig, {**ADAPT, "lora_rank": 4, "lora_dropout": 1.0}, "--lora-dropout: 1 leaves nothing to learn from"),
        (AdaptConfig, {**ADAPT, "lora_rank": 4, "lora_modules": ()}, "--lora-modules: is empty; name linear maps"),
        (config.DemoConfig, {"seed": -1}, "--seed: must be between 0 and 4294967295, got -1"),
        (EvaluateConfig, {"run": CORPUS, "qrels": OUT, "seed": -1}, "--seed: must be 0 or more, got -1"),
        (SearchConfig, {"index": OUT, "query": "q", "split": "dev"}, "--split: goes with --queries"),
        (IndexConfig, {"output": OUT, "vectors": OUT, "k1": 1.2}, "--k1: goes with --type bm25"),
        (IndexConfig, {"output": OUT, "vectors": OUT, "b": 0.75}, "--b: goes with --type bm25"),
        (IndexConfig, {"output": OUT, "vectors": OUT, "language": "german"}, "--language: goes with --type bm25"),
        (
            config.FuseConfig,
            {"run": CORPUS * 2, "output": OUT, "method": "relative", "k": 9},
            "--k: goes with --method rrf",
        ),
        (
            config.RerankConfig,
            {**RERANK, "query_length": 40, "length": 40},
            "--query-length: 40 of --length 40 leave",
        ),
    ],
)
def test_settings_that_cannot_be_right_together(make: Any, values: dict[str, Any], problem: str) -> None:
    assert [each.startswith(problem) for each in problems(make, **values)] == [True]


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (AdaptConfig, {**ADAPT, "chunk_length": 16}),
        (AdaptConfig, {**ADAPT, "loss_scale": 0.0, "lm_weight": 1.0}),
        (AdaptConfig, {**ADAPT, "language": "german"}),
        (AdaptConfig, {**ADAPT, "lora_rank": 4, "lora_alpha": 64, "lora_dropout": 0.0, "lora_modules": ("q_proj",)}),
        (config.RerankConfig, {**RERANK, "query_length": 40}),
    ],
)
def test_settings_that_can_be_right_together(make: Any, values: dict[str, Any]) -> None:
    assert make(**values).output == OUT


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"corpus": "corpus.jsonl"}, "--corpus: must be a tuple of values, got a str"),
        ({"corpus": [Path("a")]}, "--corpus: must be a tuple of values, got a list"),
        ({"lora_modules": "q_proj"}, "--lora-modules: must be a tuple of values, got a str"),
    ],
)
def test_a_string_is_no_list_of_its_characters(values: dict[str, Any], problem: str) -> None:
    assert problems(AdaptConfig, **{**ADAPT, **values}) == (problem,)


def test_a_configuration_cannot_be_changed() -> None:
    made = SearchConfig(query="why", index=Path("i"))
    with pytest.raises(FrozenInstanceError):
        made.top_k = 3  # type: ignore[misc]


def problems(make: Any, **values: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make(**values)
    return caught.value.problems


def test_all_faults_are_reported_at_once() -> None:
    found = problems(AdaptConfig, corpus=(), output=Path("o"), steps=0, warmup=2, chunk_length=-1)
    assert found == (
        "--model: is required (a folder, a hub id, or mini)",
        "--steps: must be 1 or more, got 0",
        "--warmup: must be between 0 and 1, got 2",
        "--corpus: is required",
        "--chunk-length: must be 1 or more, got -1",
    )


def test_settings_that_exclude_each_other() -> None:
    index = Path("i")
    assert "exactly one" in problems(SearchConfig, index=index)[0]
    assert "exactly one" in problems(SearchConfig, index=index, query="a", queries=Path("q"))[0]
    assert problems(SearchConfig, index=index, queries=Path("q")) == ("--output: is required with --queries",)
    assert problems(IndexConfig, output=index) == ("--vectors: is required for --type flat",)
    assert "exactly one" in problems(IndexConfig, output=index, type="bm25")[0]
    assert "--temperature" in problems(FinetuneConfig, model="m", train=(index,), output=index, temperature=0)[0]
    assert problems(EvaluateConfig, run=(), qrels=index, metrics=()) == ("--run: is required", "--metrics: is required")
