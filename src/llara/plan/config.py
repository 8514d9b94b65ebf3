"""The configurations of the plans: each is that of the job it plans, and what a plan itself takes.

They stand here and not in `llara.config`, since they are made of those.
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from llara.config import AdaptConfig, EncodeConfig, IndexConfig, JobConfig
from llara.errors import ConfigError
from llara.hardware import parse_fleet
from llara.invocation import shell_line

GPU_BUDGET = 16384  # tokens per forward pass on a GPU, where the configuration names none


@dataclass(frozen=True, kw_only=True)
class PlanConfig(JobConfig):
    """What every plan takes beside the settings of the job that it plans."""

    sample: int = 1000
    """Documents that are read, spread over the corpus; tokens are counted in them."""
    calibrate: float = 10.0
    """Seconds of the real work to measure its speed by; 0 measures nothing, and needs no weights."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [*super().problems(), *self._at_least(1, "sample"), *self._at_least(0, "calibrate")]


@dataclass(frozen=True, kw_only=True)
class FleetConfig(PlanConfig):
    """What the plan of a job that runs on GPUs takes."""

    fleet: str | None = None
    """GPUs to estimate for as well, as NUMBERxNAME or NUMBERxNAME-MEMORY: 8xH100, 2xA100-40GB."""
    peak_share: float = 0.4
    """Share of a GPU's peak arithmetic that the estimate for --fleet counts on."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = [*super().problems(), *self._within(0.01, 1, "peak_share")]
        try:
            if self.fleet is not None:
                parse_fleet(self.fleet)
        except ConfigError as error:
            problems += error.problems
        return problems


@dataclass(frozen=True, kw_only=True)
class PlanAdaptConfig(FleetConfig, AdaptConfig):
    """What `adapt` will take."""

    output: Path = Path("OUTPUT")
    """Where the run would write: the free space of that disk is compared with what the run needs."""


@dataclass(frozen=True, kw_only=True)
class PlanEncodeConfig(FleetConfig, EncodeConfig):
    """What `encode` will take."""

    output: Path = Path("VECTORS")
    """Where the run would write: the free space of that disk is compared with what the run needs."""


@dataclass(frozen=True, kw_only=True)
class PlanIndexConfig(PlanConfig, IndexConfig):
    """What `index` will take, also before there are vectors: of a model and a corpus."""

    output: Path = Path("INDEX")
    """Where the run would write: the free space of that disk is compared with what the run needs."""
    model: str = ""
    """With --corpus and a type of index over vectors: the model that will encode it, whose vectors' size counts."""
    trust_remote_code: bool = False
    """Run Python code that the model folder brings along. Only for folders whose code you have read."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = super().problems()
        if self.model and self.vectors is not None:
            problems.append("--model: goes with --corpus; the vectors in --vectors have their size")
        if self.add or self.delete is not None:
            problems.append("--add and --delete: a plan is that of a new index")
        if self.type == "milvus":
            problems.append("--type milvus: what Milvus takes cannot be told from here")
        return problems

    def _source_problems(self) -> list[str]:
        if self.vectors is None and not self.corpus:
            return ["--vectors or --corpus: give what the index will be built from"]
        if self.type == "sparse" and self.vectors is None:
            return ["--vectors: is required for --type sparse; llara plan encode --sparse says what the vectors take"]
        if self.type != "bm25" and self.vectors is None and not self.model:
            return [f"--model: is required with --corpus for --type {self.type} (a folder, a hub id, or mini)"]
        if self.vectors is not None and self.corpus:
            return ["--vectors or --corpus: give one of the two"]
        return []


def command_line(name: str, job: type[JobConfig], config: JobConfig) -> str:
    """Returns the shell line of the job that was planned: with every setting of `config` that is no default."""
    words: list[object] = [name]
    for field in fields(job):
        value = getattr(config, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(value if isinstance(value, tuple) else [value])]
    return shell_line(words)
