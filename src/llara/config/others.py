"""The configurations of the jobs beside the main one."""

from dataclasses import dataclass
from pathlib import Path

from llara.config.base import SEED_MAX, JobConfig, ModelConfig

PLOTS = (".png", ".svg", ".pdf")
MOST_ROWS = 12  # of panels in a plot: more are no picture any more


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(ModelConfig):
    """Which tokens an embedding says, read off it by the model's LM head."""

    query: tuple[str, ...] = ()
    """Queries, as text."""
    document: tuple[str, ...] = ()
    """Documents, as text; each is compared with each query."""
    compare: str | None = None
    """Another model to show beside, as it was before: --model adapted --compare base. Without a llara.json of its own
    it is given the template of --model."""
    show: int = 15
    """Terms of an embedding, and shared terms of two, that are shown."""
    top_k: int = 128
    """Terms that an embedding is taken to say: those of the largest weights."""
    fold: bool = True
    """Count the case and space variants of a token (`read`, ` read`, `Read`, `READ`) as one term, with the largest of
    their weights."""
    remove_component: bool = False
    """Take the first principal component of the sample's embeddings out of every embedding before it is read: fine-
    tuning shifts a model's embeddings mainly along it (arXiv 2406.17378)."""
    sample: tuple[Path, ...] = ()
    """Texts on which the alignment is measured and the component found: a corpus in any format. Default: documentation
    strings of Python's own packages."""
    sample_size: int = 128
    """Texts of the sample: the first ones of the corpus."""
    plot: Path | None = None
    """A picture of the same, .png, .svg or .pdf; takes the extra `report`."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = [
            *super().problems(),
            *([] if self.model else ["--model: is required (a folder, a hub id, or mini)"]),
            *([] if self.query or self.document else ["--query or --document: give at least one text"]),
            *(
                f"--{name}: is empty"
                for name in ("query", "document")
                for text in getattr(self, name)
                if not text.strip()
            ),
            *self._at_least(1, "show", "top_k", "token_budget"),
            *self._at_least(2, "sample_size"),
        ]
        if self.plot is not None and self.plot.suffix.lower() not in PLOTS:
            problems.append(f"--plot: {self.plot} is none of {', '.join(PLOTS)}")
        if self.plot is not None and self.plot_rows > MOST_ROWS:
            problems.append(f"--plot: {self.plot_rows} rows of panels, at most {MOST_ROWS} fit; give fewer texts")
        return problems

    @property
    def plot_rows(self) -> int:
        """Rows of panels in the plot: one for each query with each document, and for each model."""
        pairs = len(self.query) * len(self.document) or len(self.query) + len(self.document)
        return pairs * (1 if self.compare is None else 2)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(JobConfig):
    """Make a folder with safetensors of a model or adapter whose weights were published as pickles (.bin)."""

    model: str
    """The folder, or a hub id (organisation/name, with @revision where it is not the main one)."""
    output: Path
    """The folder to make."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(JobConfig):
    """Recompute every checksum and count of a model, vectors or index folder, and a sample of its vectors."""

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
        return [*super().problems(), *both, *self._within(0, SEED_MAX, "seed")]
