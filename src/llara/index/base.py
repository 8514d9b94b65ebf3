"""What every kind of index shares: its folder, its document ids, its hits, and the order of equal scores.

An index folder holds `manifest.json` (published last), `identity.json` (what the folder was claimed for),
`config.toml`, `ids.txt` with `ids.offsets.npy`, and the files of its type; where it was built from a corpus, also
`documents`; and `filters`, which are no part of it (see `remembered.py`). It is complete without the vectors folder it
was built from: only texts and titles to show are read there.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llara.encoding.arrays import open_array, write_array
from llara.encoding.manifest import FORMAT, check_folder, read_manifest, read_sealed, write_sealed
from llara.encoding.manifest import MANIFEST as MANIFEST
from llara.errors import StorageError
from llara.files import FileRecord, check_file, confined, read_json, write_atomic
from llara.terms import Terms

KIND = "index"
DOCUMENTS = "documents"  # the document store, where the index was built from a corpus
IDS, OFFSETS = "ids.txt", "ids.offsets.npy"

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
Queries = TypeVar("Queries", contravariant=True)
Asks = Literal["vectors", "terms", "texts", "each"]


class TopK(NamedTuple):
    """The best documents of each query, best first: `scores` float32 and `positions` int64, both [queries, k].

    A position counts documents from 0 in the order of the corpus. A query with fewer than k hits is filled up with
    position -1 and score -inf.
    """

    scores: Floats
    positions: Positions


class Allowed:
    """A set of positions of an index, as bits.

    Attributes:
        bits: uint8 [ceil(total / 8)]; bit `i % 8` of byte `i // 8`, the lowest first, tells of position i, which is
            also how FAISS' `IDSelectorBitmap` reads it.
        total: Documents of the index.
        count: Those of them that are allowed.
    """

    def __init__(self, bits: NDArray[np.uint8], total: int) -> None:
        assert len(bits) == -(-total // 8)
        self.bits, self.total = bits, total
        self.count = int(np.bitwise_count(bits).sum(dtype=np.int64))

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> "Allowed":
        """Makes it from bool [total]."""
        return cls(np.packbits(mask, bitorder="little"), len(mask))

    def mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Tells for each position from `start` to `stop` (exclusive) whether it is allowed; bool [stop - start]."""
        first = start // 8
        bits = np.unpackbits(self.bits[first : -(-stop // 8)], bitorder="little")
        return np.asarray(bits[start - 8 * first : stop - 8 * first], np.bool_)

    def holds(self, positions: Positions) -> NDArray[np.bool_]:
        """Tells for each of some positions, int64 [n], whether it is allowed; bool [n]."""
        return np.asarray((self.bits[positions >> 3] >> (positions & 7)) & 1, np.bool_)


class Index(Protocol[Queries]):
    """A searchable index. `Queries` is what it searches with: float32 [queries, dim], `Terms`, or a list of texts.

    Attributes:
        asks: Which of the three; `each` where it is several indexes, each with its own.
        manifest: What its folder says.
        model: The model that made the vectors, as `find_model` returns it; empty where none is needed.
    """

    asks: Asks
    manifest: "Manifest"
    model: str

    @property
    def ids(self) -> "Ids":
        """The id of every position, those of documents that were deleted among them."""
        ...

    def search(self, queries: Queries, top_k: int, allowed: Allowed | None = None) -> TopK:
        """Returns at most `top_k` hits per query, by score descending, ties by document id descending.

        Where `allowed` is given, these are the best of the documents in it, with the scores they have without it.
        """
        ...

    def score(self, queries: Queries, positions: Sequence[Positions]) -> list[Floats]:
        """Returns the scores of given documents, per query int64 [n] to float32 [n], as `search` gives them."""
        ...

    def __len__(self) -> int:
        """Returns the number of positions, those of deleted documents among them."""
        ...


@runtime_checkable
class Keeps(Protocol):
    """An index that can give back the vectors it was built from, unchanged, so that they can be verified."""

    def stored(self, positions: Positions) -> Floats | Terms:
        """Returns what it holds of documents at rising positions: float32 [n, dim], or their terms."""
        ...


@dataclass(frozen=True)
class Manifest:
    """What an index folder says about itself."""

    type: str
    """flat, hnsw, ivfpq, rabitq, milvus, sparse or bm25."""
    count: int
    """Documents in the folder's own files; those of `parts` come after them."""
    settings: Mapping[str, Any]
    """Of the type: the dimension, k1, b, ..."""
    model: Mapping[str, Any] | None
    """Identity of the model that made the vectors; None where no model is needed."""
    model_path: str
    """`mini`, a hub id, or the model's folder relative to the index folder, starting with a dot; see `record_model`."""
    source: str
    """Fingerprint of the vectors or documents it was built from."""
    documents: str
    """Folder of the document store, relative to the index folder."""
    files: Mapping[str, FileRecord]
    """Size and SHA-256 of every file in the folder but the manifest, which carries its own digest."""
    parts: Sequence[Mapping[str, Any]] = ()
    """Index folders whose documents follow those of this one: `folder` (relative), `count`, and `digest` of the
    manifest."""
    deleted: str = ""
    """Name of the file in `files` that lists the positions of deleted documents, where there are any."""
    digest: str = ""
    """Of the manifest itself; filled in when it is read."""

    def publish(self, folder: Path) -> None:
        """Writes `manifest.json`, with a digest of itself; this completes the index."""
        files = {name: record._asdict() for name, record in self.files.items()}
        write_sealed(folder / MANIFEST, {"format": FORMAT, "kind": KIND, **vars(self), "files": files})

    @property
    def total(self) -> int:
        """Documents in the folder and its parts, deleted ones among them."""
        return self.count + sum(int(part["count"]) for part in self.parts)

    @classmethod
    def read(cls, folder: Path, *, verify: bool = False) -> "Manifest":
        """Reads the manifest of an index folder and checks the size of every file, with `verify` also its SHA-256.

        StorageError says what is missing, damaged, or of another format, and how to build an index.
        """
        if not (folder / MANIFEST).is_file():
            if folder.is_file():
                raise StorageError(folder, "is a file, not an index folder; give a folder that llara index made")
            state = "is no finished index" if folder.is_dir() else "no such folder"
            raise StorageError(folder, f"{state}; build one with: llara index --vectors VECTORS --output {folder}")
        content = read_json(folder / MANIFEST)
        if not isinstance(content, dict) or content.get("kind", KIND) != KIND or "settings" not in content:
            found = content.get("kind", "something else") if isinstance(content, dict) else "something else"
            advice = f"build an index with: llara index --vectors {folder} --output INDEX"
            raise StorageError(folder, f"is no index folder, it holds {found}; {advice}")
        content = read_sealed(folder / MANIFEST)
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        manifest = cls(**{each.name: content[each.name] for each in fields(cls) if each.name in content})
        for name, record in manifest.files.items():
            check_file(confined(folder, name), record, full=verify)
        if verify and manifest.documents == DOCUMENTS:
            for error in check_folder(folder / DOCUMENTS, read_manifest(folder / DOCUMENTS), full=True):
                raise error
        return manifest

    @property
    def kind(self) -> str:
        """What the folder holds, in words."""
        return f"{self.type} index"


class Ids(Protocol):
    """Document ids by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> str: ...


class StoredIds:
    """The ids of an index folder, read from disk as they are asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        self._path = folder / IDS
        self._offsets = open_array(folder / OFFSETS, "int64", (count + 1,))
        self._text = np.memmap(self._path, np.uint8, "r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, position: int) -> str:
        start, stop = int(self._offsets[position]), int(self._offsets[position + 1])
        line = self._text[start:stop].tobytes() if 0 <= start < stop else b""
        # A line is whole when its only line break ends it; offsets that were damaged point elsewhere.
        if len(line) != stop - start or line.find(b"\n") != len(line) - 1:
            raise StorageError(self._path, f"is damaged: document {position} has no whole line; rebuild the index")
        try:
            return line[:-1].decode()
        except UnicodeDecodeError as error:
            raise StorageError(self._path, f"is damaged: the id of document {position} is not UTF-8") from error


def write_ids(folder: Path, ids: Iterable[str], size: int | None = None) -> dict[str, FileRecord]:
    """Writes the document ids in the order of their positions; returns the records of the two files.

    `size` is what their lines come to in bytes where that is known: that much space is reserved first.
    """
    offsets = array("q", [0])

    def lines() -> Iterator[bytes]:
        for each in ids:
            line = each.encode() + b"\n"
            offsets.append(offsets[-1] + len(line))
            yield line

    text = write_atomic(folder / IDS, lines(), size)
    # Seen as an array and not copied into one: there are 8 bytes for each document.
    return {IDS: text, OFFSETS: write_array(folder / OFFSETS, np.frombuffer(offsets, np.int64))}


def best_first(scores: Floats, positions: Positions, ids: Ids, top_k: int) -> tuple[Floats, Positions]:
    """Orders one query's candidates by score descending, ties by document id descending, and keeps `top_k`.

    `scores` float32 and `positions` int64, both [candidates]. Every candidate that ties with the last one kept must
    be among them: then the result does not depend on the order in which they come.
    """
    order = np.lexsort((positions, -scores))
    scores, positions = scores[order], positions[order]
    # Ids are looked up inside groups of equal scores only, and only for groups that reach into the first `top_k`.
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]][: len(scores)])
    stops = np.r_[starts[1:], len(scores)][: len(starts)]
    for start, stop in zip(starts, stops, strict=True):
        if start >= top_k:
            break
        if stop - start > 1:
            positions[start:stop] = sorted(positions[start:stop], key=lambda each: ids[int(each)], reverse=True)
    return scores[:top_k], positions[:top_k]


def best_rows(scores: Floats, positions: Positions, ids: Ids, top_k: int) -> TopK:
    """Does what `best_first` does for many queries at once; `scores` and `positions` are both [queries, candidates].

    A candidate with a score of -inf is none.
    """
    top_k = min(top_k, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, positions = np.take_along_axis(scores, order, axis=1), np.take_along_axis(positions, order, axis=1)
    tied = (scores[:, 1:] == scores[:, :-1])[:, :top_k] & (scores[:, :-1][:, :top_k] > -np.inf)
    for row in np.flatnonzero(tied.any(axis=1)):
        here = int((scores[row] > -np.inf).sum())
        best = best_first(scores[row, :here], positions[row, :here].copy(), ids, top_k)
        scores[row, : len(best[0])], positions[row, : len(best[1])] = best
    return TopK(scores[:, :top_k], np.where(scores[:, :top_k] > -np.inf, positions[:, :top_k], -1))


def stack(rows: list[tuple[Floats, Positions]], top_k: int) -> TopK:
    """Puts the hits of single queries into one table, filled up to `top_k` columns."""
    top = TopK(np.full((len(rows), top_k), -np.inf, np.float32), np.full((len(rows), top_k), -1, np.int64))
    for row, (scores, positions) in enumerate(rows):
        top.scores[row, : len(scores)] = scores
        top.positions[row, : len(positions)] = positions
    return top
