"""The job `convert`: a model or adapter whose weights were published as pickles becomes a folder with safetensors."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import save_file

from llara import contract as contracts
from llara.config import ConvertConfig
from llara.errors import ModelError
from llara.files import publish_folder, read_json, temporary_path, write_json_atomic
from llara.hub import DESCRIPTIONS, download, hub_name
from llara.invocation import shell_line
from llara.kinds import is_published_reranker
from llara.outputs import check_place
from llara.progress import note
from llara.publishing import write_errors

PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
INDEX = "pytorch_model.bin.index.json"
FOLDERS = "[0-9]*_*"  # those of sentence-transformers, such as 1_Pooling and 2_Dense


@dataclass(frozen=True)
class ConvertResult:
    """What `convert` wrote; `bytes` are those of the tensors."""

    output: Path
    files: int
    tensors: int
    bytes: int
    next_command: str | None


def convert(config: ConvertConfig) -> ConvertResult:
    """Writes a folder with the same tensors, under their names and in their types, as safetensors.

    Of a pickle only tensors are read (`torch.load` with `weights_only=True`): nothing in it is run. Configuration and
    tokenizer come along, those of sentence-transformers too. Memory is that of the largest file.

    Raises:
        ModelError: Nothing to convert, a part that is missing, or a pickle that holds more than tensors.
        StorageError: An output that exists and is not empty, or a full disk.
    """
    output = config.output
    source = _find(config)
    check_place(output)
    pickles = [path for path in _files(source) if _is_pickle(path)]
    if not pickles:
        raise ModelError(f"{config.model}: holds no {' and no '.join(PICKLES)}, so there is nothing to convert")
    _check_parts(source, pickles)
    staged = temporary_path(output)
    counts, size = 0, 0
    try:
        with write_errors(output):
            staged.mkdir(parents=True)
            for path in _files(source):
                place = staged / path.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                if _is_pickle(path):
                    tensors, bytes_ = _convert_file(path, place.with_name(_renamed(path.name)))
                    counts, size = counts + tensors, size + bytes_
                elif path.name == INDEX:
                    index = read_json(path)
                    index["weight_map"] = {name: _renamed(file) for name, file in index["weight_map"].items()}
                    write_json_atomic(place.with_name(_renamed(INDEX)), index)
                else:
                    shutil.copyfile(path, place)
        publish_folder(staged, output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    return ConvertResult(output, len(pickles), counts, size, _next_command(output))


def _find(config: ConvertConfig) -> Path:
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        return folder
    hub_id, revision = hub_name(config.model)
    inside = [f"{FOLDERS}/{pattern}" for pattern in (*DESCRIPTIONS, *PICKLES)]
    return download(hub_id, revision, [*PICKLES, *DESCRIPTIONS, *inside], offline=config.offline)


def _files(source: Path) -> Iterator[Path]:
    """Yields what is converted or copied, in the order of their names."""
    for folder in (source, *sorted(path for path in source.glob(FOLDERS) if path.is_dir())):
        for path in sorted(folder.iterdir()):
            if path.is_file() and (_is_pickle(path) or any(fnmatch(path.name, each) for each in DESCRIPTIONS)):
                yield path


def _is_pickle(path: Path) -> bool:
    return any(fnmatch(path.name, each) for each in PICKLES)


def _renamed(name: str) -> str:
    """Returns what safetensors call a file of weights; that of an adapter keeps its name."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _check_parts(source: Path, pickles: list[Path]) -> None:
    """Refuses a model in parts of which some are missing."""
    if not (source / INDEX).is_file():
        return
    index = read_json(source / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise ModelError(f"{source / INDEX}: is no index of weights (weight_map is missing, or maps to no files)")
    missing = sorted(set(placed.values()) - {path.name for path in pickles if path.parent == source})
    if missing:
        raise ModelError(f"{source}: lacks {', '.join(missing[:5])}, which {INDEX} names; fetch the model anew")


def _convert_file(path: Path, place: Path) -> tuple[int, int]:
    """Writes the tensors of one pickle; returns how many there are, and their bytes."""
    found = _read_tensors(path)
    save_file(found, place, metadata={"format": "pt"})
    return len(found), sum(value.nbytes for value in found.values())


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickle; tied ones share their memory there, and get one each."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no pickle of tensors
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path}: cannot be read as tensors alone: {reason}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no tensors under names, but a {type(found).__name__}")
    others = [
        str(name)
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided)
    ]
    if others:
        raise ModelError(f"{path}: holds more than dense tensors under names: {', '.join(others[:5])}")
    seen: set[int] = set()
    for name, value in found.items():
        memory = value.untyped_storage().data_ptr()
        found[name] = (value.clone() if memory in seen else value).detach().contiguous()
        seen.add(memory)
    return dict(found)


def _next_command(output: Path) -> str | None:
    """Returns what such a model is for, as far as its configuration tells; None for an adapter that must be merged."""
    if is_published_reranker(output):
        more = ["--run", "RUN", "--queries", "FILE", "--corpus", "PATH", "--output", "RUN"]
        return shell_line(["rerank", "--model", output, *more])
    if contracts.is_adapter(output):
        note(f"{output}: is a PEFT adapter; merge it into its base model (merge_and_unload), which then encodes")
        return None
    return shell_line(["encode", "--model", output, "--corpus", "PATH", "--output", "VECTORS"])
