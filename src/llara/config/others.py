"""The configurations of the jobs beside the main one."""

from dataclasses import dataclass
from pathlib import Path

from llara.config.base import SEED_MAX, JobConfig


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
        return [*super().problems(), *both, *self._within(0, SEED_MAX, "seed")]
