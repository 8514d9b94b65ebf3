"""What a folder that sentence-transformers wrote says of its vectors: pooling, normalisation, prompts, a projection.

Only its JSON files are read: `modules.json`, which lists the steps from text to vector, the configuration of each step,
and `config_sentence_transformers.json`, which may hold prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara.errors import ModelError
from llara.files import confined, read_json
from llara.templates import Pooling, Side, Template

NAME = "sentence-transformers"  # of the template that comes of it
MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
FLAG = "pooling_mode_"  # of older folders: one key per pooling, such as pooling_mode_cls_token
POOLINGS: dict[str, Pooling] = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
PASSAGE = ("document", "passage", "corpus")  # what a passage's prompt is called, the usual name first


@dataclass(frozen=True)
class Published:
    """What the folder says.

    Attributes:
        template: Prompts, pooling and normalisation; None where it pools in a way that llara does not.
        pooling: How it pools, in its own words.
        projection: The folder of a linear map from the pooled state to the vector, where there is one.
    """

    template: Template | None
    pooling: str
    projection: Path | None = None


def read_published(folder: Path) -> Published | None:
    """Returns what a folder's own files say, None where it has no `modules.json`.

    Raises:
        ModelError: A step that llara does not know, so that the vectors would be others.
        StorageError: A file that is missing or no JSON.
    """
    if not (folder / MODULES).is_file():
        return None
    steps = _steps(folder)
    pooling = _pooling(read_json(steps["Pooling"] / "config.json"), steps["Pooling"])
    projection = steps.get("Dense")
    if projection is not None:
        _check_linear(projection)
    template = None
    if pooling in POOLINGS:
        query, passage = (Side(prompt, "", (), joint=True) for prompt in _prompts(folder))
        normalise = "Normalize" in steps
        template = Template(NAME, query, passage, pooling=POOLINGS[pooling], normalise=normalise)
    return Published(template, pooling, projection)


def _steps(folder: Path) -> dict[str, Path]:
    """Returns the folder of each step, by its kind, in order."""
    path, steps = folder / MODULES, dict[str, Path]()
    listed = read_json(path)
    if not isinstance(listed, list) or not all(isinstance(each, Mapping) for each in listed):
        raise ModelError(f"{path}: is no list of the steps from text to vector")
    for each in listed:
        kind, place = str(each.get("type")).rpartition(".")[2], each.get("path")
        if kind not in ORDER or kind in steps or [*steps, kind] != sorted([*steps, kind], key=ORDER.index):
            names = ", ".join(str(each.get("type")).rpartition(".")[2] for each in listed)
            raise ModelError(
                f"{path}: goes from text to vector by {names}; llara knows {', '.join(ORDER)}, each once, in this order"
            )
        steps[kind] = confined(folder, place) if place else folder
    if steps.get("Transformer") != folder or "Pooling" not in steps:
        raise ModelError(f"{path}: names no model in this folder itself with a pooling after it")
    return steps


def _pooling(values: Any, step: Path) -> str:
    """Returns how tokens become one vector, in the folder's own words; several ways are joined by `+`."""
    if not isinstance(values, Mapping):
        raise ModelError(f"{step / 'config.json'}: is no object")
    mode = values.get("pooling_mode")
    if mode is None:
        mode = [key.removeprefix(FLAG) for key, value in values.items() if key.startswith(FLAG) and value is True]
    named = "+".join(map(str, mode)) if isinstance(mode, list) else str(mode)
    # Prompts that are read and then left out of the mean are a pooling of its own; the first token is none of theirs.
    prompts_out = values.get("include_prompt") is False and POOLINGS.get(named) == "mean" and any(_prompts(step.parent))
    return f"{named} without its prompt" if prompts_out else named


def _prompts(folder: Path) -> tuple[str, str]:
    """Returns the prompts of queries and of passages, empty where the folder names none."""
    path = folder / PROMPTS
    values = read_json(path) if path.is_file() else {}
    prompts = values.get("prompts") if isinstance(values, Mapping) else None
    if not isinstance(prompts, Mapping):
        return "", ""
    usual = prompts.get(str(values.get("default_prompt_name")), "")
    found = (
        prompts.get("query", usual),
        next((prompts[name] for name in PASSAGE if name in prompts), usual),
    )
    if not all(isinstance(prompt, str) for prompt in found):
        raise ModelError(f"{path}: prompts must be strings")
    return found


def _check_linear(step: Path) -> None:
    """Refuses a projection that is more than a linear map."""
    values = read_json(step / "config.json")
    activation = str(values.get("activation_function")) if isinstance(values, Mapping) else "none named"
    if activation.rpartition(".")[2] != "Identity":
        raise ModelError(f"{step}: projects with the activation {activation}, which llara does not; Identity it does")
