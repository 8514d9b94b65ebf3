"""Checkpoints that are whole or not there: staged, recorded, synced, renamed; only renamed ones are resumed.

A checkpoint holds the trained weights as safetensors, and the optimizer, schedule, random states and trainer state of
transformers.Trainer, read with `weights_only=True`; beside them the sums that were not logged yet.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llara.errors import StorageError
from llara.files import (
    TEMPORARY,
    FileRecord,
    check_file,
    confined,
    publish_folder,
    read_json,
    sha256_file,
    write_json_atomic,
)
from llara.training.sharding import put_weights, trained_weights

WEIGHTS, RECORD, SUMS = "weights.safetensors", "checkpoint.json", "sums.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the renamed checkpoints in a folder, oldest step first."""
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def publish_checkpoint(staged: Path, folder: Path, keep: int) -> None:
    """Records the sizes and checksums of a staged checkpoint, renames it into `folder`, and removes the oldest ones."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(staged.iterdir())
        if path.is_file()
    }
    write_json_atomic(staged / RECORD, {"files": files})
    final = folder / staged.name
    if final.exists():  # a run that was resumed from an older checkpoint passes this step again
        shutil.rmtree(final)
    publish_folder(staged, final)
    for old in list_checkpoints(folder)[:-keep]:
        # Renamed first: a checkpoint that is being deleted must not be found half deleted by the next run.
        doomed = old.with_name(f"{TEMPORARY}{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Removes the folders that a killed run left half staged or half deleted."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)


def check_checkpoint(folder: Path) -> None:
    """Recomputes a checkpoint's checksums.

    Raises:
        StorageError: A file is damaged; says which checkpoint to delete.
    """
    try:
        for name, record in _recorded_files(folder / RECORD).items():
            check_file(confined(folder, name), record, full=True)
    except StorageError as error:
        raise StorageError(error.path, f"{error.reason}; delete {folder} to resume from the one before it") from error


def _recorded_files(path: Path) -> dict[str, FileRecord]:
    content = read_json(path)
    try:
        return {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(path, "is damaged: holds no list of files") from error


def save_weights(module: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Writes the weights that training changes; tied weights once. All processes call it, and one writes."""
    trained = trained_weights(module, keep=write)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in trained.items()}, folder / WEIGHTS)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Puts the weights of a checkpoint back in place, in all processes.

    Raises:
        StorageError: The file is damaged or belongs to another model.
    """
    try:
        saved = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StorageError(folder / WEIGHTS, f"cannot be read: {error}") from error
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    if saved.keys() != trained:
        odd = ", ".join(sorted(saved.keys() ^ trained)[:5])
        raise StorageError(folder / WEIGHTS, f"belongs to another model: {odd}")
    put_weights(module, saved)


def save_sums(folder: Path, sums: dict[str, Any]) -> None:
    """Writes the loss sums since the last log line; Trainer itself forgets them."""
    write_json_atomic(folder / SUMS, sums)


def load_sums(folder: Path) -> dict[str, Any]:
    """Reads what `save_sums` wrote."""
    sums: dict[str, Any] = read_json(folder / SUMS)
    return sums
