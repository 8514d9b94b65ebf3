"""Makes a folder that llara opens from a model or an adapter whose weights were published as pickles (.bin).

    python recipes/to_safetensors.py SOURCE OUTPUT

SOURCE is a folder, or a hub id (organisation/name, or organisation/name@revision). Of the pickles only tensors are read
(`torch.load` with `weights_only=True`): nothing in them is run. The tensors keep names, shapes and dtypes.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from llara.contract import ADAPTER
from llara.errors import LlaraError, ModelError
from llara.files import TEMPORARY, publish_folder
from llara.hub import DESCRIPTIONS, download

PICKLED = "*.bin"
INDEX = ".bin.index.json"


def find(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    hub_id, _, revision = source.partition("@")
    return download(hub_id, revision, [PICKLED, *DESCRIPTIONS], offline=False)


def new_name(name: str) -> str:
    """Returns what safetensors call a file of weights; `adapter_model` keeps its name."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def convert(source: Path, output: Path) -> int:
    """Writes the folder, at once; returns the number of tensors.

    Raises:
        ModelError: Nothing to convert, a pickle that holds more than tensors, or an output that exists.
    """
    pickles = sorted(path for path in source.glob(PICKLED) if path.name.startswith(("pytorch_model", "adapter_model")))
    if not pickles:
        raise ModelError(f"{source}: holds no pytorch_model*.bin and no adapter_model.bin")
    if output.exists():
        raise ModelError(f"{output}: exists already; give a folder that does not")
    staged = output.with_name(TEMPORARY + output.name)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for pattern in DESCRIPTIONS:
        for path in source.glob(pattern):
            if not path.name.endswith(INDEX):
                shutil.copyfile(path, staged / path.name)
    count = 0
    for path in pickles:
        tensors = read_tensors(path)
        count += len(tensors)
        save_file(tensors, staged / new_name(path.name), metadata={"format": "pt"})
    for path in source.glob(f"*{INDEX}"):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {name: new_name(file) for name, file in index["weight_map"].items()}
        (staged / new_name(path.name)).write_text(json.dumps(index, indent=2), encoding="utf-8")
    publish_folder(staged, output)
    return count


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickle; tied ones share their memory there, and get one each."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no pickle of tensors
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path}: cannot be read as tensors alone: {reason}") from error
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ModelError(f"{path}: holds more than tensors: {', '.join(others[:5])}")
    seen: set[int] = set()
    for name, value in found.items():
        memory = value.untyped_storage().data_ptr()
        found[name] = (value.clone() if memory in seen else value).detach().contiguous()
        seen.add(memory)
    return dict(found)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        source, output = find(arguments[0]), Path(arguments[1])
        count = convert(source, output)
    except LlaraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = "rerank" if (output / ADAPTER).is_file() else "encode"
    print(f"{count:,} tensors in {output}\nnext: llara {kind} --model {output} ...")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
