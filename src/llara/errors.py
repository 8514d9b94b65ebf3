"""The errors a user can cause, each with what went wrong, where, and what to do about it.

Everything here derives from `LlaraError`; the command line prints its message as one line and exits with 2.
A fault of ours is any other exception: it keeps its traceback and exits with 1.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class LlaraError(Exception):
    """A mistake that the user can mend: bad input, a bad setting, a missing file, a full disk."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By what it holds and not by calling its class: so an error of any kind goes from a worker to its driver.
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[LlaraError], args: tuple[Any, ...], values: dict[str, Any]) -> LlaraError:
    error = kind.__new__(kind, *args)
    vars(error).update(values)
    return error


LONGEST_REASON = 1000  # characters: what a row holds may be megabytes, and an error is one line to be read


class ConfigError(LlaraError):
    """One or more settings that do not fit; all of them are reported at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class DataError(LlaraError):
    """A row of a data file that does not fit its format."""

    def __init__(self, path: str | Path, line: int | None, reason: str) -> None:
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[: LONGEST_REASON * 3 // 4]} ... {reason[-LONGEST_REASON // 4 :]}"
        self.path, self.line, self.reason = str(path), line, reason
        where = self.path if line is None else f"{self.path}:{line}"
        super().__init__(f"{where}: {reason}")


class ModelError(LlaraError):
    """A model folder that cannot be used as asked: incomplete, changed, or of the wrong kind."""


class StorageError(LlaraError):
    """A file or folder that cannot be written or trusted: a full disk, damage, or another configuration's output."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(f"{self.path}: {reason}")


class WorkerError(LlaraError):
    """A worker process or machine that is lost for good, or a cluster that cannot be reached or has no room."""


class MissingExtra(LlaraError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f"{feature} needs an optional dependency; install it with: pip install 'llara[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
