"""What jobs share whose output is one file: the check before any work, and the settings kept beside the file."""

from collections.abc import Iterable
from pathlib import Path

from llara.config import JobConfig, to_toml
from llara.errors import ConfigError
from llara.files import check_output, write_atomic


def settings_path(output: Path) -> Path:
    """Returns where the configuration of an output file is kept."""
    return output.with_name(f"{output.name}.toml")


def check_file_output(
    output: Path, inputs: Iterable[Path], folders: Iterable[Path] = (), flag: str = "--output"
) -> None:
    """Checks, before any work, that a file and its settings may be written.

    Raises:
        ConfigError: One of the two is an input, or lies in one of `folders`, which are inputs as a whole.
        StorageError: No file can stand there.
    """
    inputs = list(inputs)
    for path in (output, settings_path(output)):
        check_output(path, inputs, flag)
    for folder in folders:
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{flag}: {output} lies in the folder {folder}, an input; give another place")


def save_settings(output: Path, config: JobConfig) -> None:
    """Writes the effective configuration beside an output file; `--config` reads it back."""
    write_atomic(settings_path(output), to_toml(config).encode())
