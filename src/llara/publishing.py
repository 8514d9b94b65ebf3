"""Publishing a model: all files of its folder in one rename, and errors that say what is missing."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llara import contract as contracts
from llara.errors import StorageError
from llara.files import disk_errors, free_bytes, publish_folder, temporary_path, write_json_atomic


def publish_model(
    lm: Any, tokenizer: Any, folder: Path, extra_files: Mapping[str, str], record: Callable[[Path], dict[str, Any]]
) -> None:
    """Publishes a model folder in one rename; `record` gives the content of `llara.json` for the files in a folder."""
    staged = temporary_path(folder)  # not tempfile's: its folders cannot be read by others
    staged.mkdir(parents=True)
    with write_errors(folder):
        lm.save_pretrained(staged, safe_serialization=True)
    tokenizer.save_pretrained(staged)
    for name, content in extra_files.items():
        (staged / name).write_text(content, encoding="utf-8")
    write_json_atomic(staged / contracts.FILE_NAME, record(staged))
    publish_folder(staged, folder)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns what safetensors and torch raise when they cannot write into a `StorageError`: neither is an OSError.

    Both check what they wrote, so unlike FAISS or numpy they leave no short file unnoticed.
    """
    try:
        with disk_errors(path):
            yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container|write", str(error)):
            raise
        reason = str(error).strip().partition("\n")[0]
        free = free_bytes(path.parent)
        raise StorageError(path, f"cannot be written ({reason}); {free:,} bytes are free") from error
