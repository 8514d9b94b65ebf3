"""What a command prints when its job is done: the result on stdout, and the command to run next."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llara.cli.hits import render_hits
from llara.config import FinetuneConfig, IndexConfig, JobConfig, RerankConfig, SearchConfig
from llara.files import durability_notes
from llara.invocation import shell_line


def show(result: Any, *, as_json: bool) -> None:
    """Writes a job's result to stdout: one JSON object, or text for people.

    A result is a dataclass; where it has `to_text` or `to_json`, these say how it wants to be shown.
    """
    if as_json:
        value = result.to_json() if hasattr(result, "to_json") else result
        print(json.dumps(plain(value), ensure_ascii=False))
    else:
        text = to_text(result)
        print(text, end="" if not text or text.endswith("\n") else "\n")


def to_text(result: Any) -> str:
    """Returns a result as text for people."""
    if hasattr(result, "to_text"):
        return str(result.to_text())
    if getattr(result, "answers", ()) or (hasattr(result, "answers") and getattr(result, "output", None) is None):
        return render_hits(result.answers)
    values = {name: value for name, value in _fields(result).items() if value not in (None, (), {}, [])}
    width = max(map(len, values), default=0)
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_short(value)}" for name, value in values.items())


def plain(value: Any) -> Any:
    """Returns a value as JSON values: records become objects, paths strings, and what is no number null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) or hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in _fields(value).items()}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"a result holds a {type(value).__name__}, which has no form in JSON")


def _fields(value: Any) -> dict[str, Any]:
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_short(item) for item in value)
    return str(value)


def remarks(config: JobConfig, result: Any) -> list[str]:
    """Returns what a user should know beside the result, one line each."""
    weaker = [f"this file system keeps fewer promises: {note}" for note in durability_notes(of_system=False)]
    rejected = getattr(result, "rejected", 0)
    if not rejected or getattr(config, "vectors", None):  # the vectors' own rows were reported when they were encoded
        return weaker
    output: Path = config.output  # type: ignore[attr-defined]
    folder = output / "documents" if isinstance(config, IndexConfig) else output
    return [f"{rejected:,} bad rows were left out: {folder / 'rejected.jsonl'} says which and why", *weaker]


def next_command(name: str, config: JobConfig, result: Any) -> str | None:
    """Returns the command that usually follows; words in capitals are for the user to fill in."""
    own = getattr(result, "next_command", None)
    if own:
        return str(own)
    output = getattr(config, "output", None)
    words: dict[str, list[Any]] = {
        "adapt": ["finetune", "--model", output, "--train", "PATH", "--output", "DIR"],
        "finetune": ["encode", "--model", output, "--corpus", "PATH", "--output", "VECTORS"],
        "encode": ["index", "--vectors", output, "--output", "INDEX"],
        "index": ["search", "YOUR QUESTION", "--index", output],
        "fuse": ["evaluate", "--run", output, "--qrels", "FILE"],
        "mine": ["finetune", "--model", "DIR", "--train", output, "--output", "DIR"],
        "evaluate": ["search", "YOUR QUESTION", "--index", "INDEX"],
        "verify": ["doctor"],
        "doctor": ["demo"],
    }
    if isinstance(config, IndexConfig):
        words["index"] += _model_flag(config.output)
    if isinstance(config, FinetuneConfig) and config.task == "rerank":
        more = ["--queries", "FILE", "--corpus", "PATH", "--output", "RUN"]
        words["finetune"] = ["rerank", "--model", config.output, "--run", "RUN", *more]
    if isinstance(config, RerankConfig):  # beside the run it began with
        words["rerank"] = ["evaluate", "--run", config.run, output, "--qrels", "FILE"]
    if isinstance(config, SearchConfig):
        words["search"] = _after_search(config)
    return shell_line(words[name]) if name in words else None


def _after_search(config: SearchConfig) -> list[Any]:
    if config.queries is not None and config.split is not None:  # only a collection has splits, and it has judgements
        return ["evaluate", "--run", config.output, "--qrels", config.queries, "--split", config.split]
    if config.queries is not None:
        return ["evaluate", "--run", config.output, "--qrels", "FILE"]
    model = ["--model", config.model] if config.model else []
    only = ["--filter", *config.filter] if config.filter else []
    return ["search", *model, "--index", config.index, *_hybrid(config), *only, "--queries", "FILE", "--output", "RUN"]


def _hybrid(config: SearchConfig) -> list[Any]:
    """Returns the flags of a search of several indexes that are not at their defaults."""
    if not config.hybrid:
        return []
    weights = ["--weights", *config.weights] if config.weights else []
    return ["--hybrid", *config.hybrid, *([] if config.method == "rrf" else ["--method", config.method]), *weights]


def _model_flag(index: Path) -> list[str]:
    """Returns what `search` must be told of the model: nothing where the index leads to a folder, or needs none."""
    if not (index / "manifest.json").is_file():
        return []
    from llara.encoding.manifest import find_model, is_local
    from llara.index.base import Manifest

    manifest = Manifest.read(index)
    if manifest.type == "bm25":
        return []
    model = find_model(manifest.model_path, index)
    if is_local(model):
        return []
    return ["--model", "MODEL" if not model or Path(model).is_absolute() else model]
