"""What every kind of index shares: its folder, its document ids, its answer, and the order of equal scores.

An index folder holds `manifest.json` (published last), `identity.json` (what the folder was claimed for),
`config.toml`, `ids.txt` with `ids.offsets.npy`, and the files of its kind. It is complete without the vectors folder
it was built from; only texts and titles for display are read from there.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llara.errors import StorageError
from llara.files import FileRecord, check_file, json_bytes, read_json, write_atomic, write_json_atomic

MANIFEST = "manifest.json"
FORMAT = 1
IDS, OFFSETS = "ids.txt", "ids.offsets.npy"

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
Queries = TypeVar("Queries", contravariant=True)


class Answer(NamedTuple):
    """The best documents of each query, best first: `scores` float32 and `positions` int64, both [queries, k].

    A position counts documents from 0 in the order of the corpus. A query with fewer than k hits is filled up with
    position -1 and score -inf.
    """

    scores: Floats
    positions: Positions


class Index(Protocol[Queries]):
    """A searchable index. `Queries` is what it searches with: float32 [queries, dim], or a list of texts."""

    manifest: "Manifest"
    ids: "Ids"

    def search(self, queries: Queries, top_k: int) -> Answer:
        """Returns at most `top_k` hits per query, by score descending, ties by document id descending."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Manifest:
    """What an index folder says about itself."""

    kind: str
    """flat or bm25."""
    count: int
    """Documents in the index."""
    settings: Mapping[str, Any]
    """Of the kind: the dimension, k1, b, ..."""
    model: Mapping[str, Any] | None
    """Identity of the model that made the vectors; None where no model is needed."""
    source: str
    """Fingerprint of the vectors or documents it was built from."""
    documents: str
    """Folder of the document store, relative to the index folder."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def publish(self, folder: Path) -> None:
        """Writes `manifest.json`, with a digest of itself; this completes the index."""
        value = {"format": FORMAT, **vars(self), "files": {name: [*record] for name, record in self.files.items()}}
        write_json_atomic(folder / MANIFEST, {**value, "digest": _digest(value)})

    @classmethod
    def read(cls, folder: Path, *, verify: bool = False) -> "Manifest":
        """Reads the manifest of an index folder and checks the size of every file, with `verify` also its SHA-256.

        StorageError says what is missing, damaged, or of another format, and how to build an index.
        """
        if not (folder / MANIFEST).is_file():
            found = "is no complete index" if folder.is_dir() else "is missing"
            raise StorageError(folder, f"{found}; build one with: llara index --vectors VECTORS --output {folder}")
        value = read_json(folder / MANIFEST)
        if not isinstance(value, dict) or "kind" not in value or "format" not in value:
            raise StorageError(folder, f"is no index folder: {MANIFEST} is that of something else")
        if value["format"] != FORMAT:
            raise StorageError(folder, f"has index format {value['format']}; this version reads {FORMAT}: rebuild it")
        digest = value.pop("digest", None)
        if digest != _digest(value):
            raise StorageError(folder / MANIFEST, "is damaged: its digest does not fit its content; rebuild the index")
        del value["format"]
        value["files"] = {name: FileRecord(*record) for name, record in value["files"].items()}
        manifest = cls(**value)
        for name, record in manifest.files.items():
            check_file(folder / name, record, full=verify)
        return manifest


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(value)).hexdigest()


class Ids:
    """Document ids by position, read from disk as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._offsets = load_array(folder / OFFSETS, np.dtype(np.int64))
        self._text = np.memmap(folder / IDS, np.uint8, "r")
        if not len(self._offsets) or self._offsets[0] != 0 or self._offsets[-1] != len(self._text):
            raise StorageError(folder / OFFSETS, f"is damaged: it does not fit {IDS}")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, position: int) -> str:
        start, stop = int(self._offsets[position]), int(self._offsets[position + 1])
        try:
            return self._text[start : stop - 1].tobytes().decode()  # without the newline
        except UnicodeDecodeError as error:
            raise StorageError(IDS, f"is damaged: the id of document {position} is not UTF-8") from error


def write_ids(folder: Path, ids: Iterable[str]) -> dict[str, FileRecord]:
    """Writes the document ids in the order of their positions; returns the records of the two files."""
    offsets = [0]

    def lines() -> Iterator[bytes]:
        for each in ids:
            line = each.encode() + b"\n"
            offsets.append(offsets[-1] + len(line))
            yield line

    text = write_atomic(folder / IDS, lines())
    return {IDS: text, OFFSETS: write_array(folder / OFFSETS, np.array(offsets, np.int64))}


def write_array(path: Path, array: NDArray[Any]) -> FileRecord:
    """Publishes an array as an .npy file (`numpy.save` reports no full disk), and returns its record."""
    array = np.ascontiguousarray(array)
    return write_atomic(path, iter((_npy_header(array), array.data.cast("B"))) if array.size else _npy_header(array))


def _npy_header(array: NDArray[Any]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()


def load_array(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory-maps a one-dimensional .npy array; a file that is damaged or of another type is a StorageError."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StorageError(path, f"is damaged: {error}") from error
    if array.dtype != dtype or array.ndim != 1:
        raise StorageError(path, f"is damaged: holds {array.dtype} {array.shape}, expected {dtype} in one dimension")
    return array


def best_first(scores: Floats, positions: Positions, ids: Ids, top_k: int) -> tuple[Floats, Positions]:
    """Orders one query's candidates by score descending, ties by document id descending, and keeps `top_k`.

    `scores` float32 and `positions` int64, both [candidates]. Every candidate that ties with the last one kept must
    be among them: then the result does not depend on the order in which they come.
    """
    order = np.lexsort((positions, -scores))
    scores, positions = scores[order], positions[order]
    # Ids are looked up inside groups of equal scores only, and only for groups that reach into the first `top_k`.
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]]) if len(scores) else np.empty(0, np.int64)
    stops = np.r_[starts[1:], len(scores)]
    for start, stop in zip(starts, stops, strict=True):
        if start >= top_k:
            break
        if stop - start > 1:
            positions[start:stop] = sorted(positions[start:stop], key=lambda each: ids[int(each)], reverse=True)
    return scores[:top_k], positions[:top_k]


def stack(rows: list[tuple[Floats, Positions]], top_k: int) -> Answer:
    """Puts the hits of single queries into one answer, filled up to `top_k` columns."""
    answer = Answer(np.full((len(rows), top_k), -np.inf, np.float32), np.full((len(rows), top_k), -1, np.int64))
    for row, (scores, positions) in enumerate(rows):
        answer.scores[row, : len(scores)] = scores
        answer.positions[row, : len(positions)] = positions
    return answer


def relative_path(target: Path, folder: Path) -> str:
    """Returns how `target` is reached from `folder`, so that both can be moved together."""
    return os.path.relpath(target.resolve(), folder.resolve())
