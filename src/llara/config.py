"""One frozen dataclass per job: the function's argument, the command's flags and the TOML file are the same thing.

A field's docstring is its `--help` text. A configuration checks itself when it is made and reports every fault at once.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llara.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job takes."""

    offline: bool = False
    """Make no network call at all; a missing file is then an error that names the path expected."""
    verify: bool = False
    """Recompute every checksum of what is opened, not only sizes and headers."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Returns every setting that cannot be right, as `--flag: what is wrong`."""
        return self._not_finite()

    def _not_finite(self) -> list[str]:
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            f"--{name.replace('_', '-')}: must be a finite number, got {value}"
            for name, value in numbers.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]

    def _at_least(self, minimum: float, *names: str) -> list[str]:
        return [
            f"--{name.replace('_', '-')}: must be {minimum} or more, got {getattr(self, name)}"
            for name in names
            if getattr(self, name) is not None and getattr(self, name) < minimum
        ]

    def _within(self, low: float, high: float, *names: str) -> list[str]:
        return [
            f"--{name.replace('_', '-')}: must be between {low} and {high}, got {getattr(self, name)}"
            for name in names
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high
        ]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(JobConfig):
    """How a model is loaded. Jobs that may run without one (BM25 search) leave `model` empty."""

    model: str = ""
    """Model folder, hub id, or `mini` for the small base model inside the package."""
    template: str | None = None
    """paper, release, repllama, or a TOML file of your own; default: what the model folder says, else paper."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Start every text with the BOS token; auto: what the model folder says, else what the tokenizer does by itself."""
    dtype: Dtype = "auto"
    """Weights while running; auto: float32 on CPU, bfloat16 on a GPU that has it.
    All weights trained (no LoRA): auto keeps them float32, and computes in bfloat16 on such a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; training takes the first GPU that it sees."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along. Only for folders whose code you have read."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelConfig):
    """What both training stages take."""

    output: Path
    """Folder of the trained model; until the run ends, checkpoints and log lie beside it, in OUTPUT.partial."""
    steps: int | None = None
    """Optimizer steps; default: what --epochs comes to."""
    epochs: float = 1.0
    """Passes over the training data, where --steps is not given."""
    batch_size: int = 32
    """Chunks (adapt) or queries (finetune) per batch."""
    accumulation: int = 1
    """Batches per optimizer step and process."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU.
    It decides how a batch is cut into passes, so memory and speed, and not what is learned."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""
    lora_rank: int = 0
    """Rank of LoRA; 0 trains all weights."""
    lora_alpha: int = 16
    """Scale of LoRA: its update is multiplied by alpha / rank."""
    lora_dropout: float = 0.1
    """Dropout inside LoRA."""
    lora_modules: tuple[str, ...] = ("all-linear",)
    """Names of the linear maps that get LoRA; `all-linear` means all but the LM head."""
    seed: int = 42
    """Seed of sampling, dropout and new weights."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept while training."""
    log_every: int = 10
    """Steps between log lines."""
    measure_every: int = 100
    """Steps between measurements on held-out text, where the job has some; the last step is always measured."""
    report_to: tuple[str, ...] = ()
    """Logging integrations of transformers: tensorboard, wandb, trackio."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = super().problems()
        if self.dtype == "float16":
            problems.append("--dtype: float16 cannot be trained without loss scaling; use float32, bfloat16 or auto")
        if self.device.startswith("cuda:") and self.device != "cuda:0":
            problems.append(
                f"--device: training takes the first GPU; choose one with CUDA_VISIBLE_DEVICES={self.device[5:]}"
            )
        return [
            *problems,
            *([] if self.model else ["--model: is required (a folder, a hub id, or mini)"]),
            *self._at_least(1, "steps", "batch_size", "accumulation", "token_budget"),
            *self._at_least(1, "save_every", "keep", "log_every", "measure_every"),
            *self._at_least(0, "epochs", "learning_rate", "weight_decay", "max_grad_norm", "lora_rank", "seed"),
            *self._within(0, 1, "warmup", "lora_dropout"),
        ]


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(TrainConfig):
    """Stage 1: EBAE + EBAR on plain text, no labels."""

    corpus: tuple[Path, ...]
    """Plain text, JSON lines, tsv or a BEIR folder; several are read one after the other."""
    objective: Literal["ebae+ebar", "ebae", "ebar", "lm"] = "ebae+ebar"
    """ebae predicts the text's own tokens, ebar those of the next text; lm is plain language modelling (a baseline)."""
    chunk_length: int = 128
    """Tokens of text per chunk, template not counted."""
    min_chunk_length: int = 16
    """Shorter chunks at the end of a document are not trained on; they still serve as a next text."""
    max_chunks: int | None = None
    """Train on a seeded sample of this many chunks."""
    targets: Literal["unique", "all"] = "unique"
    """unique: the set of tokens of the target text; all: every token, repeats counted."""
    loss_scale: float | None = None
    """Factor on the EBAE and EBAR losses; default: the template's (paper 1, release 0.1)."""
    lm_weight: float = 0.0
    """Weight of an added language-model loss on the text."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        alone = (
            [] if self.objective != "lm" or not self.lm_weight else ["--lm-weight: adds to ebae and ebar, not to lm"]
        )
        return [
            *super().problems(),
            *alone,
            *([] if self.corpus else ["--corpus: is required"]),
            *self._at_least(1, "chunk_length", "min_chunk_length", "max_chunks"),
            *self._at_least(0, "lm_weight", "loss_scale"),
        ]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Stage 2: contrastive learning on queries, relevant passages and hard negatives."""

    train: tuple[Path, ...]
    """JSON lines with query, pos, neg; or a collection with judgements (BEIR folder, pairs file, SQuAD JSON).
    A path given several times counts several times."""
    split: str = "train"
    """Split of the collections given as --train. Of a BEIR folder without dev.tsv, a fifth of the queries of `train` is
    held back as `dev`; `train-all` takes all of them. SQuAD JSON has only `test`."""
    negatives: int = 7
    """Hard negatives per query, drawn anew each epoch; queries that have fewer use what they have."""
    temperature: float = 0.01
    """Scores are divided by this before the softmax."""
    query_length: int | None = None
    """Tokens of a query, prompt included; default: what the model folder says, else 64."""
    passage_length: int | None = None
    """Tokens of a passage, prompt included; default: what the model folder says, else 160."""
    titles: bool = True
    """Put the title in front of a passage, here and, through the model folder, everywhere after."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.train else ["--train: is required"]),
            *self._at_least(0, "negatives"),
            *self._at_least(1, "query_length", "passage_length"),
            *([] if self.temperature > 0 else [f"--temperature: must be above 0, got {self.temperature}"]),
        ]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(ModelConfig):
    """Encode a corpus into a vectors folder."""

    corpus: tuple[Path, ...]
    """JSON lines, tsv, plain text, or a collection (BEIR folder, pairs file, SQuAD JSON)."""
    output: Path
    """The vectors folder; a run that was stopped goes on where it was."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU."""
    shard_size: int = 10_000
    """Input rows per shard."""
    passage_length: int | None = None
    """Tokens of a passage, prompt included; default: what the model folder says."""
    vector_dtype: Literal["float32", "float16"] = "float32"
    """Type of the vectors on disk."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.model else ["--model: is required (a folder, a hub id, or mini)"]),
            *([] if self.corpus else ["--corpus: is required"]),
            *self._at_least(1, "token_budget", "shard_size", "passage_length"),
        ]


@dataclass(frozen=True, kw_only=True)
class IndexConfig(JobConfig):
    """Build a searchable index."""

    output: Path
    """The index folder."""
    vectors: Path | None = None
    """Vectors folder to build from."""
    corpus: tuple[Path, ...] = ()
    """Corpus to build from, for bm25 without a vectors folder."""
    type: Literal["flat", "bm25"] = "flat"
    """flat: exact inner product over vectors; bm25: words, no model."""
    k1: float = 0.9
    """BM25: how fast repeated words saturate."""
    b: float = 0.4
    """BM25: how much long documents are held back."""
    language: str = "english"
    """BM25: language of the stemmer and the stop words."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        numbers = [*self._at_least(0, "k1"), *self._within(0, 1, "b")]
        return [*super().problems(), *numbers, *self._source_problems()]

    def _source_problems(self) -> list[str]:
        problems = []
        if self.type == "flat" and self.vectors is None:
            problems.append("--vectors: is required for --type flat")
        if self.type == "flat" and self.corpus:
            problems.append("--corpus: goes with --type bm25; a flat index is built from --vectors")
        if self.type == "bm25" and (self.vectors is None) == (not self.corpus):
            problems.append("--vectors or --corpus: --type bm25 needs exactly one of the two")
        return problems


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ModelConfig):
    """Search an index, with a file of queries or with one query."""

    query: str | None = None
    """One query as text; its hits are printed."""
    index: Path
    """The index folder."""
    queries: Path | None = None
    """Queries: JSON lines, tsv, or a collection."""
    split: str | None = None
    """Take only the queries that this split of the collection judges."""
    output: Path | None = None
    """The run, in TREC format."""
    top_k: int | None = None
    """Hits per query; default: 10 for one query, 1000 for a run."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = [*super().problems(), *self._at_least(1, "top_k", "token_budget")]
        if (self.query is None) == (self.queries is None):
            problems.append("--query or --queries: give exactly one of the two")
        if self.queries is not None and self.output is None:
            problems.append("--output: is required with --queries")
        return problems


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    """Measure one or more runs against judgements; the first run is the baseline of the others."""

    run: tuple[Path, ...]
    """Runs in TREC format."""
    qrels: Path
    """Judgements: TREC qrels, BEIR tsv, or a collection."""
    split: str = "test"
    """Split of a collection given as --qrels."""
    metrics: tuple[str, ...] = ("nDCG@10", "R@100", "RR@10")
    """Measures by their names in ir-measures."""
    permutations: int = 10_000
    """Resamples of the paired randomisation test."""
    seed: int = 42
    """Seed of the randomisation test."""
    output: Path | None = None
    """Also write the table and the per-query values here, as JSON."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.run else ["--run: is required"]),
            *([] if self.metrics else ["--metrics: is required"]),
            *self._at_least(1, "permutations"),
        ]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(JobConfig):
    """Recompute every checksum of a model, vectors or index folder."""

    path: Path
    """The folder."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(JobConfig):
    """The whole job on the documentation strings of the installed packages, with the model inside the package."""

    output: Path | None = None
    """Folder for everything the demo makes; a second run resumes. Default: llara-demo, with -fast or -full."""
    fast: bool = False
    """A smaller sample: under two minutes."""
    full: bool = False
    """All documentation strings; takes hours on a CPU."""
    seed: int = 42
    """Seed of the sample and of the training."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        both = ["--fast and --full: give one of the two"] if self.fast and self.full else []
        return [*super().problems(), *both]


def to_plain(config: JobConfig) -> dict[str, Any]:
    """Returns a configuration as JSON values: paths become strings, tuples lists, unset fields are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return {name: plain(value) for name, value in asdict(config).items() if value is not None}


def to_toml(config: JobConfig) -> str:
    """Returns a configuration as a TOML file that `--config` reads back to the same configuration.

    Only a path whose bytes are not UTF-8 does not come back: TOML has no way to write it. U+FFFD stands for such a
    byte, and a comment says so.
    """
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in to_plain(config).items())


def _toml_value(value: Any) -> str:
    # JSON's strings, numbers and booleans are also TOML's, but for DEL, which TOML wants escaped, and surrogates, which
    # it forbids: whole characters are written as they are, and bytes that Python decoded to half a pair are replaced.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    whole = "".join("\ufffd" if "\ud800" <= char <= "\udfff" else char for char in text)
    return whole if whole == text else f"{whole}  # \ufffd stands for a byte that is not UTF-8"
