"""The weights of the best step by a measurement on held-out examples, and when to stop looking for a better one.

What was best, and how long ago, is read from the log's history, which checkpoints bring along: so a run that goes on
chooses as one that was never stopped. The weights lie beside the checkpoints, in `best-<step>`.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from llara.files import TEMPORARY, publish_folder, read_json
from llara.progress import note
from llara.publishing import write_errors
from llara.training.checkpoint import list_checkpoints, load_weights, save_weights
from llara.training.dev import CRITERION
from llara.training.watch import VOLATILE

if TYPE_CHECKING:
    from llara.training.trainer import JobTrainer

History = Sequence[Mapping[str, Any]]
STATE = "trainer_state.json"
_NAME = re.compile(r"best-(\d+)")


def best_entry(history: History) -> Mapping[str, Any] | None:
    """Returns the log entry of the best step, the earliest of equals; None where none was measured."""
    measured = [entry for entry in history if CRITERION in entry]
    return max(measured, key=lambda entry: (entry[CRITERION], -entry["step"]), default=None)


def is_exhausted(history: History, patience: int) -> bool:
    """Tells whether `patience` measurements have followed the best one; never, where patience is 0."""
    best = best_entry(history)
    later = [entry for entry in history if CRITERION in entry and best is not None and entry["step"] > best["step"]]
    return 0 < patience <= len(later)


def newest_history(folder: Path) -> History:
    """Returns the log's history as the newest checkpoint has it, or an empty one."""
    found = list_checkpoints(folder)
    return _history(found[-1]) if found else []


def best_folder(folder: Path, step: int) -> Path:
    """Returns where the weights of a best step lie."""
    return folder / f"best-{step}"


def run_to_best(trainer: "JobTrainer", patience: int) -> tuple[int, dict[str, float]]:
    """Trains, and puts the weights of the best step back in place.

    Returns:
        The optimizer steps of the run, and the log's values at the best step, with that step as `best_step`.
    """
    trainer.add_callback(KeepBest(trainer, patience))
    history = trainer.ranks.ask(lambda: newest_history(trainer.folder))
    if not is_exhausted(history, patience):  # else it was stopped between its last step and its end
        trainer.run()
        history = trainer.state.log_history
    best = best_entry(history)
    assert best is not None, "the last step is always measured"
    steps = max(int(entry["step"]) for entry in history if CRITERION in entry)
    load_weights(trainer.accelerator.unwrap_model(trainer.module), best_folder(trainer.folder, best["step"]))
    note(f"the best of {steps:,} steps is {best['step']:,}: nDCG@10 {best[CRITERION]:.4f} on the held-out queries")
    values = {key: value for key, value in best.items() if isinstance(value, float) and key not in VOLATILE}
    return steps, {**values, "best_step": float(best["step"])}


class KeepBest(TrainerCallback):
    """Saves the weights at each measurement that is the best so far, and stops a run whose patience has run out."""

    def __init__(self, trainer: "JobTrainer", patience: int) -> None:
        self.trainer, self.patience = trainer, patience

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks at the entry that has just been logged."""
        if not state.log_history or CRITERION not in state.log_history[-1]:
            return
        best = best_entry(state.log_history)
        if best is not None and best["step"] == state.global_step:
            self._save(state.global_step)
        if is_exhausted(state.log_history, self.patience):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes weights that no checkpoint calls the best, nor will."""
        if not self.trainer.ranks.first:
            return
        kept = list_checkpoints(self.trainer.folder)
        best = best_entry(_history(kept[0])) if kept else None
        for path in self.trainer.folder.glob("best-*"):
            match = _NAME.fullmatch(path.name)
            if match and best is not None and int(match[1]) < best["step"]:
                shutil.rmtree(path)

    def _save(self, step: int) -> None:
        trainer = self.trainer
        final = best_folder(trainer.folder, step)
        staged = final.with_name(TEMPORARY + final.name)
        module: nn.Module = trainer.module
        if trainer.ranks.first:
            for leftover in (staged, final):  # a run that goes on passes this step again
                shutil.rmtree(leftover, ignore_errors=True)
        with write_errors(final):
            save_weights(module, staged, write=trainer.ranks.first)
        if trainer.ranks.first:
            publish_folder(staged, final)


def _history(checkpoint: Path) -> History:
    history: list[dict[str, Any]] = read_json(checkpoint / STATE)["log_history"]
    return history
