"""What an encoded corpus says about itself: one manifest per folder and one sidecar per shard.

    manifest.json          identity, later the shards; published first (state "encoding") and last ("complete")
    shard-00000.json       rows, counts, rejected rows, size and SHA-256 of the shard's files; published after them
    shard-00000.npy        vectors [documents, dim], or [passages, dim]; absent where only documents are stored
    shard-00000.scales.npy what int8 vectors are multiplied by
    shard-00000.passages.npy   where long documents were cut: which document each vector is of, and which part of it
    shard-00000.terms...   sparse vectors, where they were asked for; see `llara.encoding.numbers`
    shard-00000.ids ...    the document store, see `llara.encoding.documents`
    rejected.jsonl         every input row that is in no shard, with file, line and reason

Both kinds of JSON file are sealed: they carry the SHA-256 of their own content and have one spelling, so that any
changed byte is found when they are read. Neither tells when or where it was written: a model in a local folder is named
by its path from this folder.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llara.encoding.arrays import Array, npy_bytes, open_array
from llara.errors import StorageError
from llara.files import FileRecord, check_file, confined, json_bytes, parse_json, read_bytes, write_atomic
from llara.terms import Terms

FORMAT = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
VECTORS = "npy"
SCALES = "scales.npy"
TERMS = {"starts": "terms.starts.npy", "ids": "terms.ids.npy", "weights": "terms.weights.npy"}
PASSAGES = (
    "passages.npy"  # int64 [passages, 3]: document of the shard, and the characters where the passage starts and stops
)
CUT = "cut"  # names how long documents were cut in an identity; folders whose documents have one vector each lack it
SPARSE = "sparse"  # names the settings of sparse vectors in an identity; folders without them lack it
MINI = "mini"  # names the model inside the package
RESUME = {"vectors": "llara encode", "documents": "llara index"}


class Shard(NamedTuple):
    """One sidecar: input rows `start` to `end` (exclusive, from 0), of which `documents` were accepted.

    `rejected` holds `row` (from 1 over the corpus), `file`, `line`, `reason` and, for a duplicate, `id` of the others.
    `files` maps the suffix of each file to its record. `source` is the digest of the raw rows.
    """

    name: str
    start: int
    end: int
    documents: int
    source: str
    rejected: list[dict[str, Any]]
    files: dict[str, FileRecord]

    def path(self, folder: Path, suffix: str) -> Path:
        """Returns the path of one of the shard's files."""
        return confined(folder, f"{self.name}.{suffix}")


def shard_name(number: int) -> str:
    """Returns the name that all files of a shard start with."""
    return f"shard-{number:05d}"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns JSON content with its digest in it."""
    bare = {key: value for key, value in content.items() if key != "digest"}
    return {**bare, "digest": hashlib.sha256(json_bytes(bare)).hexdigest()}


def write_sealed(path: Path, content: Mapping[str, Any]) -> str:
    """Publishes JSON content with its digest, which is returned."""
    sealed = seal(content)
    write_atomic(path, json_bytes(sealed))
    return str(sealed["digest"])


def read_sealed(path: Path) -> dict[str, Any]:
    """Returns sealed content; any byte that is not as written is a `StorageError`."""
    raw = read_bytes(path)
    content = parse_json(path, raw)
    if not isinstance(content, dict) or json_bytes(seal(content)) != raw:
        raise StorageError(path, "is damaged: its content does not fit the checksum in it")
    if content.get("format") != FORMAT:
        raise StorageError(path, f"has format {content.get('format')}, this version of llara reads {FORMAT}")
    return content


def write_sidecar(folder: Path, shard: Shard) -> str:
    """Publishes a shard's sidecar, which makes the shard finished; returns its digest."""
    files = {suffix: record._asdict() for suffix, record in shard.files.items()}
    return write_sealed(shard.path(folder, "json"), {**shard._asdict(), "files": files, "format": FORMAT})


def read_sidecar(folder: Path, name: str) -> tuple[Shard, str]:
    """Returns a shard and the digest of its sidecar."""
    path = confined(folder, f"{name}.json")
    content = read_sealed(path)
    digest = content.pop("digest")
    files = {suffix: FileRecord(**record) for suffix, record in content["files"].items()}
    shard = Shard(**{key: value for key, value in content.items() if key in Shard._fields} | {"files": files})
    if shard.name != name:
        raise StorageError(path, f"is damaged: belongs to {shard.name}")
    return shard, digest


def check_shard(folder: Path, shard: Shard, *, full: bool) -> Iterator[StorageError]:
    """Yields what is wrong with the files of a shard; `full` recomputes their checksums."""
    for suffix, record in shard.files.items():
        try:
            check_file(shard.path(folder, suffix), record, full=full)
        except StorageError as error:
            advice = f"delete {shard.name}.json and run the same command again to make this shard anew"
            yield StorageError(error.path, f"{error.reason}; {advice}")


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Returns the manifest of a folder that is complete, and of this kind; anything else is a `StorageError`."""
    path = folder / MANIFEST
    if not path.exists():
        raise StorageError(folder, f"holds no {MANIFEST}: give a folder that llara encode made, or make one")
    manifest = read_sealed(path)
    if manifest["kind"] not in ([kind] if kind else RESUME):
        raise StorageError(folder, f"holds {manifest['kind']}, not {kind or 'vectors or documents'}")
    if manifest["state"] != "complete":
        command = RESUME[manifest["kind"]]
        raise StorageError(folder, f"is not complete: run the same {command} command again, which goes on where it was")
    return manifest


def open_sidecar(folder: Path, entry: Mapping[str, Any]) -> Shard:
    """Returns a shard that the manifest lists as `entry`; a sidecar other than the one listed is a `StorageError`."""
    shard, digest = read_sidecar(folder, entry["name"])
    if digest != entry["digest"]:
        raise StorageError(folder / f"{shard.name}.json", "is damaged: it is not the one that the manifest lists")
    return shard


def check_folder(folder: Path, manifest: Mapping[str, Any], *, full: bool) -> Iterator[StorageError]:
    """Yields what is wrong with the files that a manifest stands for, one error per file."""
    for name, record in manifest["files"].items():
        try:
            check_file(confined(folder, name), FileRecord(**record), full=full)
        except StorageError as error:
            yield error
    for entry in manifest["shards"]:
        try:
            shard = open_sidecar(folder, entry)
        except StorageError as error:
            yield error
            continue
        damage = list(check_shard(folder, shard, full=full))
        yield from damage
        if VECTORS in shard.files and not damage:
            try:
                _open_stored(folder, manifest, entry)
                if CUT in manifest["identity"]:
                    open_passages(folder, shard)
                if SPARSE in manifest["identity"]:
                    open_terms(folder, shard)
            except StorageError as error:
                yield error


def open_vectors(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> Array:
    """Returns the vectors of a shard that the manifest lists, [rows, dim], read-only.

    float32 and float16 are memory-mapped; int8 ones are float32 in memory, each multiplied by its scale.
    """
    vectors, scales = _open_stored(folder, manifest, entry)
    return vectors if scales is None else np.multiply(vectors, scales[:, None], dtype=np.float32)


def _open_stored(folder: Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[Array, Array | None]:
    """Returns the vectors of a shard as they are stored, and the scales of int8 ones, both memory-mapped."""
    identity = manifest["identity"]
    kind = identity["vector_dtype"]
    count = count_rows(open_sidecar(folder, entry)) if CUT in identity else entry["documents"]
    vectors = open_array(confined(folder, f"{entry['name']}.{VECTORS}"), kind, (count, identity["dim"]))
    path = confined(folder, f"{entry['name']}.{SCALES}")
    return vectors, open_array(path, "float32", (count,)) if kind == "int8" else None


def count_rows(shard: Shard) -> int:
    """Returns how many vectors a shard holds: one per document, or per passage."""
    if PASSAGES not in shard.files:
        return shard.documents
    return (shard.files[PASSAGES].bytes - npy_bytes(np.dtype("<i8"), (0, 3))) // 24


def open_passages(folder: Path, shard: Shard) -> Array:
    """Returns which passages the vectors of a shard are of, int64 [rows, 3], see `PASSAGES`; memory-mapped.

    Raises:
        StorageError: The shard has none, or they are not those of its documents.
    """
    if PASSAGES not in shard.files:
        raise StorageError(shard.path(folder, "json"), f"is damaged: lists no {shard.name}.{PASSAGES}")
    path = shard.path(folder, PASSAGES)
    table = open_array(path, "int64", (count_rows(shard), 3))
    steps = np.diff(table[:, 0], prepend=-1, append=shard.documents)
    if not ((steps == 0) | (steps == 1)).all() or not ((table[:, 1] >= 0) & (table[:, 1] <= table[:, 2])).all():
        raise StorageError(path, "is damaged: holds passages that no encoder cut; run llara verify on the folder")
    return table


def open_terms(folder: Path, shard: Shard) -> Terms:
    """Returns the sparse vectors of a shard, memory-mapped and read-only; what is in them is not looked at."""
    lacking = [suffix for suffix in TERMS.values() if suffix not in shard.files]
    if lacking:
        raise StorageError(shard.path(folder, "json"), f"is damaged: lists no {shard.name}.{lacking[0]}")
    header = npy_bytes(np.dtype("<i4"), (0,))
    count = (shard.files[TERMS["ids"]].bytes - header) // 4
    shapes = {"starts": ("int64", count_rows(shard) + 1), "ids": ("int32", count), "weights": ("float32", count)}
    return Terms(
        **{part: open_array(shard.path(folder, TERMS[part]), dtype, (size,)) for part, (dtype, size) in shapes.items()}
    )


def corpus_digest(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the fingerprint of the rows that the shards of a manifest were made from."""
    return hashlib.sha256(json_bytes([[entry["end"], entry["source"]] for entry in entries])).hexdigest()


def relative_path(target: Path, folder: Path) -> str:
    """Returns how `target` is reached from `folder`, so that both can be moved together."""
    return os.path.relpath(target.resolve(), folder.resolve())


def record_model(model: str, folder: Path) -> str:
    """Returns the name by which a record in `folder` remembers a model that a user named, or `find_model` found.

    `mini` and hub ids stay as they are. A local folder becomes its path from `folder`, which always starts with a dot,
    as no hub id does: wherever a command is run, the one is never taken for the other.
    """
    place = Path(model).expanduser()
    if model == MINI or not (place.is_absolute() or place.is_dir()):
        return model
    path = relative_path(place, folder)
    return path if path.startswith(".") else f"./{path}"


def find_model(recorded: str, folder: Path) -> str:
    """Returns the model that a record in `folder` names: `mini`, a hub id, or the absolute path of a local folder."""
    return os.path.normpath(folder.resolve() / recorded) if recorded.startswith(".") else recorded


def is_local(model: str) -> bool:
    """Tells whether a model that `find_model` returned is on this machine: `mini`, or a folder that is there."""
    return model == MINI or (Path(model).is_absolute() and Path(model).is_dir())
