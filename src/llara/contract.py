"""The contract: what a saved model says about how text becomes a vector, kept in `llara.json` beside the weights.

It is written with the weights and checked at load, so that a folder means the same everywhere. `llara.json` holds the
contract, a record of every file of the folder, a probe (texts, their token ids and vectors), and its own digest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from llara import __version__
from llara.errors import ModelError, StorageError
from llara.files import FileRecord, check_file, confined, json_bytes, read_bytes, read_json, sha256_file
from llara.templates import PAPER, Pooling, SideName, Template

FILE_NAME = "llara.json"
FORMAT, VERSION = "llara-model", 1
RERANKER = "llara-reranker"
ADAPTER = "adapter_config.json"
KINDS = {
    FORMAT: "a retriever, which makes vectors (llara encode, search)",
    RERANKER: "a reranker, which scores a query with a document (llara rerank)",
}
# The files whose change alters token ids or shapes are small: their checksums are recomputed at every load.
SMALL_FILE = 32 * 2**20
DTYPES = {"float32", "float16", "bfloat16", "float64"}
LOADED = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py"}


@dataclass(frozen=True)
class Contract:
    """How text becomes a vector.

    Attributes:
        template: Strings and slots around a text.
        bos: Whether every text starts with BOS.
        title_separator: What stands between title and text of a passage; None leaves titles out.
        query_length: Tokens of a query at most, prompt included.
        passage_length: Tokens of a passage at most, prompt included.
        pooling: Which hidden states become the vector: the mean of the slots', the first token's (`cls`), or the mean
            of all (`mean`); see `pooling.py`.
        normalise: Whether vectors have unit length.
        causal: Whether a position sees only what stands before it, as in a decoder; in an encoder it sees all.
    """

    template: Template = PAPER
    bos: bool = False
    title_separator: str | None = " "
    query_length: int = 64
    passage_length: int = 160
    pooling: Pooling = "mean_of_slots"
    normalise: bool = True
    causal: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values that `from_dict` reads back."""
        return {**asdict(self), "template": self.template.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Contract":
        """Reads a contract; `source` names the file in errors.

        Raises:
            ModelError: A field is missing or unknown, or says something that this version cannot do.
        """
        known = set(asdict(cls()))
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise ModelError(f"{source}: the contract's fields do not fit this version of llara: {odd}")
        contract = cls(**{**values, "template": Template.from_dict(values["template"], f"{source}: template")})
        if contract.pooling != contract.template.pooling or contract.causal == contract.template.encoder:
            raise ModelError(f"{source}: pooling {contract.pooling!r}, causal {contract.causal}: not supported")
        return contract

    def with_template(self, template: Template) -> "Contract":
        """Returns the contract with another template, and with what the template says beyond its strings."""
        causal = not template.encoder
        return replace(
            self,
            template=template,
            bos=self.bos and causal,
            pooling=template.pooling,
            normalise=template.normalise,
            causal=causal,
        )

    def length(self, side: SideName) -> int:
        """Returns how many tokens a text of this side may have, prompt included."""
        return self.query_length if side == "query" else self.passage_length

    def join_title(self, title: str, text: str) -> str:
        """Returns a passage's full text."""
        return join_title(self.title_separator, title, text)

    def with_lengths(self, query_length: int | None, passage_length: int | None) -> "Contract":
        """Returns the contract with the lengths that are given replaced."""
        return replace(
            self,
            query_length=query_length or self.query_length,
            passage_length=passage_length or self.passage_length,
        )


class Storable(Protocol):
    """A contract of any kind."""

    def to_dict(self) -> dict[str, Any]:
        """Returns its JSON values."""
        ...


def join_title(separator: str | None, title: str, text: str) -> str:
    """Returns a full text; the one place where a title meets its text. Without text, it is the title.

    `separator` None leaves titles out.
    """
    if not text.strip():
        return title or text
    return f"{title}{separator}{text}" if title and separator is not None else text


def digest(values: Any) -> str:
    """Returns the SHA-256 of JSON values, as hex, independent of key order and layout."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def folder_files(folder: Path) -> list[str]:
    """Returns the names of the files in a model folder, `llara.json` and hidden ones left out."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name != FILE_NAME and not path.name.startswith(".")
    )


def loaded_files(folder: Path) -> list[str]:
    """Returns those files of a model folder that decide what is loaded; a model card or a log does not."""
    return [name for name in folder_files(folder) if Path(name).suffix in LOADED]


def fingerprint(checksums: Mapping[str, str], contract: Storable) -> str:
    """Returns a SHA-256 over the contract and the files that decide what is loaded, given as name to SHA-256.

    The configuration that a run keeps beside its model is left out: it names paths, and the same training elsewhere
    makes the same model.
    """
    files = {name: value for name, value in checksums.items() if Path(name).suffix in LOADED}
    return digest({"files": files, "contract": contract.to_dict()})


def make_record(
    folder: Path, contract: Storable, probe: Mapping[str, Any], *, has_head: bool = True, form: str = FORMAT
) -> dict[str, Any]:
    """Returns the content of `llara.json` for the files that lie in `folder`; `form` is one of `KINDS`.

    `has_head` is False where the LM head is no trained one: the model was made from a folder without.
    """
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in folder_files(folder)
    }
    record = {
        "format": form,
        "version": VERSION,
        "llara": __version__,
        "contract": contract.to_dict(),
        "has_head": has_head,
        "files": files,
        "probe": probe,
    }
    return {**record, "digest": digest(record)}


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder holds a PEFT adapter alone, without the model that it belongs to."""
    return (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()


def form_of(folder: Path) -> str | None:
    """Returns which of `KINDS` a folder says it is, or None where it has no `llara.json`.

    Raises:
        ModelError: The file is of no known kind.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") not in KINDS:
        raise ModelError(f"{path}: is no llara model record")
    return str(record["format"])


def refuse_other_form(model: str, form: str) -> None:
    """Refuses a local model folder that says it is of another kind than `form`; whatever else is left to its loading.

    Raises:
        ModelError: Says which kind it is; or its `llara.json` is of no known kind.
    """
    folder = Path(model).expanduser()
    found = form_of(folder)
    if found not in (None, form):
        raise ModelError(f"{folder}: is {KINDS[found]}, and not {KINDS[form]}")


def read_record(folder: Path, form: str = FORMAT) -> dict[str, Any] | None:
    """Returns the content of a folder's `llara.json`, or None where there is none.

    Raises:
        ModelError: The file was changed after it was written, or is that of another kind of model than `form`.
    """
    path, found = folder / FILE_NAME, form_of(folder)
    if found is None:
        return None
    if found != form:
        raise ModelError(f"{folder}: is {KINDS[found]}, and not {KINDS[form]}")
    record: dict[str, Any] = read_json(path)
    if record.get("version") != VERSION:
        raise ModelError(f"{path}: version {record.get('version')}; this llara reads version {VERSION}")
    if digest({key: value for key, value in record.items() if key != "digest"}) != record.get("digest"):
        raise ModelError(
            f"{path}: was changed after it was saved. The contract belongs to the weights; "
            "train again with other settings, or restore the file"
        )
    faults = _shape_faults(record)
    if faults:
        raise ModelError(f"{path}: is not of the form that llara writes: {', '.join(faults)}")
    return record


def _shape_faults(record: Mapping[str, Any]) -> list[str]:
    """Returns what in a record is not of the type that is read from it; its digest only shows who wrote it last."""
    faults = [
        f"{key} is no {kind.__name__}"
        for key, kind in {"contract": dict, "files": dict, "probe": dict, "has_head": bool}.items()
        if not isinstance(record.get(key), kind)
    ]
    if faults:
        return faults
    contract, probe = record["contract"], record["probe"]
    pairs = record["format"] == RERANKER
    for key in ("query_length", "length" if pairs else "passage_length"):
        if type(contract.get(key)) is not int or contract[key] < 1:
            faults.append(f"contract.{key} is no length")
    if not isinstance(contract.get("template"), dict):
        faults.append("contract.template is no object")
    if any(type(contract.get(key)) is not bool for key in (("bos",) if pairs else ("bos", "normalise", "causal"))):
        faults.append("contract.bos, normalise or causal is neither true nor false")
    for name, entry in record["files"].items():
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            faults.append(f"files.{name} has no size and checksum")
    entries, fits = probe.get("entries"), _is_pair_entry if pairs else _is_probe_entry
    if probe.get("dtype") not in DTYPES or not isinstance(entries, list) or not all(map(fits, entries)):
        faults.append("probe is no list of texts with ids and vectors or scores in a known dtype")
    return faults


def _is_probe_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("side") in ("query", "passage")
        and isinstance(entry.get("text"), str)
        and _are(entry.get("ids"), int)
        and _are(entry.get("vector"), (int, float))
    )


def _is_pair_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("query"), str)
        and isinstance(entry.get("document"), str)
        and _are(entry.get("ids"), int)
        and isinstance(entry.get("score"), int | float)
    )


def _are(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def check_files(folder: Path, record: Mapping[str, Any], *, full: bool) -> int:
    """Checks sizes of all files, checksums of the small ones, and with `full` those of all; returns the bytes hashed.

    Raises:
        StorageError: A file is missing, or differs from what was saved.
        ModelError: A file that was not there when the model was saved.
    """
    hashed = 0
    if full and read_bytes(folder / FILE_NAME) != json_bytes(record):  # the digest does not see white space
        raise StorageError(folder / FILE_NAME, "is not as it was written, though its settings are the same")
    for name, entry in record["files"].items():
        complete = full or (entry["bytes"] <= SMALL_FILE and not name.endswith(".safetensors"))
        check_file(confined(folder, name), FileRecord(entry["bytes"], entry["sha256"]), full=complete)
        hashed += entry["bytes"] if complete else 0
    strangers = set(loaded_files(folder)) - set(record["files"])
    if strangers:
        raise ModelError(f"{folder}: holds files that were not saved with the model: {', '.join(sorted(strangers))}")
    return hashed


def describe_difference(expected: Sequence[int], found: Sequence[int]) -> str:
    """Returns where two lists of token ids part, for an error message."""
    for position, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return f"token {position} was {left} when saved and is {right} now"
    return f"{len(expected)} tokens when saved, {len(found)} now"
