"""What a run shows while it trains: a progress line, `log.jsonl`, and the logging integrations of transformers.

A log entry has two kinds of values. Losses, recall and padding follow from seed and data, and are the same again in a
run that was stopped and goes on. Speed, waiting and memory are of this machine and this hour; `VOLATILE` names them.
"""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

from llara.progress import Progress

VOLATILE = ("tokens_per_second", "wait", "memory_gb")
SHOWN = {"loss": "loss", "recall_ebae": "recall ebae", "recall_ebar": "recall ebar", "learning_rate": "lr"}
PART = "loss_"  # what the losses behind the whole one begin with


class Tally:
    """Sums since the last log line, of this process: losses, examples, tokens and padded cells."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.reset()

    def reset(self) -> None:
        """Starts anew, after a log line."""
        self.sums = torch.zeros(len(self.names), dtype=torch.float64)
        self.counts = torch.zeros(len(self.names), dtype=torch.float64)
        self.tokens = self.cells = 0

    def see(self, passes: Sequence[Mapping[str, Any]]) -> None:
        """Counts what passes hold."""
        for batch in passes:
            self.counts += batch["counts"]
            self.tokens += batch["tokens"]
            self.cells += batch["cells"]

    def state(self) -> dict[str, Any]:
        """Returns the sums as JSON values, which `restore` takes back."""
        return {
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
            "tokens": self.tokens,
            "cells": self.cells,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` returned."""
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)
        self.tokens, self.cells = state["tokens"], state["cells"]


def means(names: Sequence[str], tallies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the mean loss per name, and the share of padding, over the tallies of all processes."""
    values = {}
    for place, name in enumerate(names):
        count = sum(tally["counts"][place] for tally in tallies)
        if count:
            values[f"{PART}{name}"] = sum(tally["sums"][place] for tally in tallies) / count
    cells = sum(tally["cells"] for tally in tallies)
    if cells:
        values["padding"] = 1.0 - sum(tally["tokens"] for tally in tallies) / cells
    return values


class Meter:
    """Speed, waiting and memory since the last look at them."""

    def __init__(self) -> None:
        self.look(0.0)

    def look(self, waited: float) -> None:
        """Starts a new stretch; `waited` counts the seconds that steps have waited for data since the run began."""
        self._began, self._waited, self.tokens = time.perf_counter(), waited, 0

    def values(self, waited: float) -> dict[str, float]:
        """Returns the values that `VOLATILE` names, of this process."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        return {
            "tokens_per_second": self.tokens / seconds,
            "wait": (waited - self._waited) / seconds,
            "memory_gb": peak_memory() / 2**30,
        }


def together(meters: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns what all processes train, and what the one says that waits or holds most; see `Meter.values`."""
    values = {name: max(each[name] for each in meters) for name in VOLATILE}
    return values | {"tokens_per_second": sum(each["tokens_per_second"] for each in meters)}


def peak_memory() -> int:
    """Returns the most bytes that tensors held on the GPU, or, without one, that the process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class LogFile:
    """`log.jsonl`: one line of JSON per log entry that holds a loss."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes the entries that a resumed run brings along: lines after its checkpoint go."""
        self.path.write_text("".join(_line(entry) for entry in history if "loss" in entry), encoding="utf-8")

    def add(self, entry: Mapping[str, Any]) -> None:
        """Appends one entry."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


class Watched(Protocol):
    """What the watcher asks of a trainer."""

    def restore(self) -> None:
        """Puts back what a checkpoint brings, before the first step."""
        ...

    def measures_now(self) -> bool:
        """Tells whether the step that has just ended is one to measure after."""
        ...


class Watcher(TrainerCallback):
    """The progress line on stderr; asks for a log line at the last step, and wherever something is measured."""

    def __init__(self, trainer: Watched, label: str) -> None:
        self.trainer, self.label = trainer, label
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the line where the run starts."""
        # A checkpoint brings the intervals of the run that made it; this run's own apply.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self.trainer.restore()
        if state.is_world_process_zero:
            self.progress = Progress(self.label, state.max_steps, "steps")
            self.progress.__enter__()
            self.progress.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts a step."""
        if state.global_step >= state.max_steps or self.trainer.measures_now():
            control.should_log = True  # the last steps count too, where log_every does not divide their number
        if self.progress is not None:
            self.progress.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows the values of a log entry."""
        if self.progress is not None and "loss" in logs:
            self.progress.advance(0, **_shown(logs))

    def close(self, error: BaseException | None) -> None:
        """Ends the progress line; `error` is what stopped the run, if anything did."""
        if self.progress is not None:
            self.progress.__exit__(type(error) if error else None, error, None)


def _shown(entry: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the progress line says of a log entry; the parts of a loss where it has several."""
    parts = [key for key in entry if key.startswith(PART)]
    labels = {"loss": "loss", **({key: key.removeprefix(PART) for key in parts} if len(parts) > 1 else {})}
    shown = {label: f"{entry[key]:.4g}" for key, label in (labels | SHOWN).items() if key in entry}
    shown["tokens/s"] = f"{entry['tokens_per_second']:,.0f}"
    if "padding" in entry:
        shown["padding"] = f"{entry['padding']:.1%}"
    return shown | {"waiting": f"{entry['wait']:.1%}", "memory": f"{entry['memory_gb']:.2f} GB"}
