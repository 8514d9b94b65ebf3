"""What jobs share whose output is one file: the check before any work, and the settings kept beside the file."""

import os
from collections.abc import Iterable
from pathlib import Path

from llara.config import JobConfig, to_toml
from llara.errors import ConfigError, StorageError
from llara.files import check_output, disk_errors, write_atomic


def settings_path(output: Path) -> Path:
    """Returns where the configuration of an output file is kept."""
    return output.with_name(f"{output.name}.toml")


def check_place(output: Path, flag: str = "--output") -> None:
    """Checks, before any work, that something may be made at `output`.

    Raises:
        StorageError: What lies above it is no folder, or one that cannot be written into.
    """
    with disk_errors(output):
        place = output.absolute()
        above = next((parent for parent in place.parents if parent.exists()), place)  # the root has none above it
        if not above.is_dir():
            raise StorageError(output, f"cannot be made, {above} is no folder; choose another {flag}")
        if not os.access(above, os.W_OK | os.X_OK):
            raise StorageError(output, f"cannot be made, {above} cannot be written into; choose another {flag}")


def check_file_output(
    output: Path, inputs: Iterable[Path], folders: Iterable[Path] = (), flag: str = "--output"
) -> None:
    """Checks, before any work, that a file and its settings may be written.

    Raises:
        ConfigError: One of the two is an input, or lies in one of `folders`, which are inputs as a whole.
        StorageError: No file can stand there.
    """
    inputs = list(inputs)
    check_output(output, inputs, flag)  # a folder has perhaps no name, to which the settings' could be added
    check_output(settings_path(output), inputs, flag)
    check_place(output, flag)
    for folder in folders:
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{flag}: {output} lies in the folder {folder}, an input; give another place")


def save_settings(output: Path, config: JobConfig) -> None:
    """Writes the effective configuration beside an output file; `--config` reads it back."""
    write_atomic(settings_path(output), to_toml(config).encode())
