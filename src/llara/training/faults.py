"""What stops a run: a loss or gradient that is no number, and memory that runs out; said so that a user can mend it."""

from collections.abc import Sequence
from pathlib import Path

from llara.config import TrainConfig
from llara.errors import StorageError
from llara.files import write_json_atomic

NAMED = 8  # documents that a message names; a step may hold thousands
LISTED = "bad_step.json"  # where all of them stand, in the work folder


def not_finite(folder: Path, what: str, step: int, documents: Sequence[str], checkpoint: str | None) -> str:
    """Returns the message on a step whose loss or gradient is no number: where, on which documents, what is left.

    Where there are more documents than a message can name, all are listed in `folder`.
    """
    named, more = ", ".join(documents[:NAMED]), ""
    if len(documents) > NAMED:
        more = f" and {len(documents) - NAMED:,} more, {_list(folder / LISTED, what, step, documents)}"
    left = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return (
        f"the {what} at step {step}; nothing was updated with it, and {left}. "
        f"Lower --learning-rate, or look at the documents of that step: {named}{more}"
    )


def _list(path: Path, what: str, step: int, documents: Sequence[str]) -> str:
    try:
        write_json_atomic(path, {"what": what, "step": step, "documents": list(documents)})
    except StorageError as error:  # what stopped the run must be said, whatever the disk is like
        return f"which could not be listed ({error})"
    return f"all listed in {path}"


def out_of_memory(config: TrainConfig, step: int, error: BaseException) -> str:
    """Returns the message on memory that ran out: settings that help and leave what is trained as it is."""
    asked = "" if config.token_budget is None else f" (now {config.token_budget:,})"
    helps = [f"--token-budget{asked}, which decides how a batch is cut into passes"]
    if not config.gradient_checkpointing:
        helps.append("--gradient-checkpointing, which computes again what it does not keep")
    return (
        f"out of memory at step {step}: {str(error).strip().splitlines()[0]}. Lower {'; add '.join(helps)}. "
        "Batch size and learning rate stay as they are; the same command goes on from the last checkpoint"
    )
