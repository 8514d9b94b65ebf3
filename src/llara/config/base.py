"""What every configuration is, what those that load a model share, and the way to TOML."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_origin

from llara.errors import ConfigError

SEED_MAX = 2**32 - 1
"""Largest seed of a training run: numpy's generator, which transformers seeds as well, takes no larger one."""
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Backend = Literal["torch", "openvino"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every job takes."""

    offline: bool = False
    """Make no network call at all; a missing file is then an error that names the path expected."""
    verify: bool = False
    """Recompute every checksum of what is opened, not only sizes and headers."""

    def __post_init__(self) -> None:
        problems = self._not_lists() or self.problems()  # what is no list cannot be looked at as one
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Returns every setting that cannot be right, as `--flag: what is wrong`."""
        return self._not_finite()

    def _not_lists(self) -> list[str]:
        """From Python, where nothing else looks at types: one string would be taken for a list of its characters."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if get_origin(field.type) is tuple}
        return [
            f"--{name.replace('_', '-')}: must be a tuple of values, got a {type(value).__name__}"
            for name, value in values.items()
            if not isinstance(value, tuple)
        ]

    def _not_finite(self) -> list[str]:
        numbers = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            f"--{name.replace('_', '-')}: must be a finite number, got {value}"
            for name, value in numbers.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]

    def _only_with(self, given: bool, condition: str, *names: str) -> list[str]:
        """Returns a problem for each of `names` that was set although nothing reads it without `condition`."""
        defaults = {field.name: field.default for field in fields(self)}
        return [
            f"--{name.replace('_', '-')}: goes with {condition}"
            for name in names
            if not given and getattr(self, name) != defaults[name]
        ]

    def _above_zero(self, *names: str) -> list[str]:
        return [
            f"--{name.replace('_', '-')}: must be above 0, got {getattr(self, name)}"
            for name in names
            if getattr(self, name) is not None and getattr(self, name) <= 0
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
    """Model folder, hub id (organisation/name, with @revision where it is not the main one), or `mini` for the small
    base model inside the package."""
    template: str | None = None
    """paper, release or repllama for decoders; e5, bge, retromae, cls or mean for encoders; or a TOML file of your own.
    Default: what the model folder says, else paper."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Start every text with the BOS token; auto: what the model folder says, else what the tokenizer does by itself."""
    dtype: Dtype = "auto"
    """Weights while running; auto: float32 on CPU, bfloat16 on a GPU that has it; int8: on a CPU, fastest, and near
    those of float32. All weights trained (no LoRA): auto keeps them float32, and computes in bfloat16 on such a GPU."""
    backend: Backend = "torch"
    """What runs the model; openvino is faster on CPUs: pip install 'llara[openvino]'."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; training takes the first GPU that it sees."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along. Only for folders whose code you have read."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = super().problems()
        if self.backend == "openvino" and self.dtype not in ("auto", "float32", "bfloat16"):
            problems.append(f"--dtype: {self.dtype} does not go with --backend openvino; float32 and bfloat16 do")
        if (self.backend == "openvino" or self.dtype == "int8") and self.device not in ("auto", "cpu"):
            flag = "--backend: openvino" if self.backend == "openvino" else "--dtype: int8"
            problems.append(f"{flag} runs on a CPU, and --device is {self.device}")
        return problems


def pair_length_problems(query_length: int | None, length: int | None) -> list[str]:
    """Returns what is wrong with a reranker's lengths: those of the query, and of query and document together."""
    if query_length is None or length is None or query_length < length:
        return []
    return [f"--query-length: {query_length} of --length {length} leave no room for a document"]


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
