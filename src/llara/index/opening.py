"""Opens an index folder, whatever its type, with its parts and without its deleted documents."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llara.encoding.manifest import check_folder, read_manifest
from llara.errors import StorageError
from llara.index.base import DOCUMENTS, Ids, Index, Manifest, StoredIds
from llara.index.bm25 import Bm25Index
from llara.index.faiss import Effort, FaissIndex
from llara.index.flat import FlatIndex
from llara.index.milvus import MilvusIndex
from llara.index.parts import JoinedIds, PartedIndex
from llara.index.passages import PassageIds, PassageIndex, open_documents
from llara.index.shape import TYPES
from llara.index.sparse import SparseIndex

AnyIndex = Index[Any]


def open_index(folder: Path, *, verify: bool = False, effort: Effort | None = None) -> AnyIndex:
    """Opens an index folder, memory-mapped, after checking the sizes of its files; with `verify` their SHA-256 too.

    The documents of an index that was built from a corpus lie in its folder, and are checked with it. `effort` is how
    hard an approximate index looks.

    Raises:
        ConfigError: An effort that the type of the index does not know.
        StorageError: A folder, or a part of it, that is missing, damaged, or no index.
    """
    manifest = Manifest.read(folder, verify=verify)
    if manifest.documents == DOCUMENTS:
        for error in check_folder(folder / DOCUMENTS, read_manifest(folder / DOCUMENTS), full=False):
            raise error
    if manifest.type == "milvus":
        return _open_milvus(folder, manifest, verify=verify)
    own = [_open_one(folder, manifest, effort)] if manifest.count else []
    if own and not manifest.parts and not manifest.deleted:
        return own[0]
    parts = [_open_part(folder, manifest, each, verify=verify, effort=effort) for each in manifest.parts]
    return PartedIndex(folder, manifest, [*own, *parts])


def _open_one(folder: Path, manifest: Manifest, effort: Effort | None) -> AnyIndex:
    documents = open_documents(folder, manifest)
    if documents is None:
        return _open_type(folder, manifest, effort, None)
    ids = PassageIds(StoredIds(folder, manifest.count), documents)
    inner = _open_type(folder, replace(manifest, count=len(documents)), effort, ids)
    return PassageIndex(folder, manifest, inner, documents)


def _open_type(folder: Path, manifest: Manifest, effort: Effort | None, ids: Ids | None) -> AnyIndex:
    """Opens the files of a type; `ids` name what its vectors are of, where they are not documents."""
    if manifest.type in TYPES:
        return FaissIndex(folder, manifest, effort, ids)
    if manifest.type == "flat":
        return FlatIndex(folder, manifest, ids)
    if manifest.type == "sparse":
        return SparseIndex(folder, manifest, ids)
    if manifest.type == "bm25":
        return Bm25Index(folder, manifest)
    raise StorageError(folder, f"is an index of type {manifest.type!r}, which this version does not know")


def _open_milvus(folder: Path, manifest: Manifest, *, verify: bool) -> AnyIndex:
    """One collection holds all vectors; the parts of the folder hold the ids of documents that were added."""
    ids: list[Ids] = [StoredIds(folder, manifest.count)]
    for part in manifest.parts:
        place = folder / str(part["folder"])
        added = Manifest.read(place, verify=verify)
        _check_part(folder, manifest, part, added, added.count)
        ids.append(StoredIds(place, added.count))
    return MilvusIndex(folder, manifest, JoinedIds(ids))


def _open_part(folder: Path, whole: Manifest, part: Any, *, verify: bool, effort: Effort | None) -> AnyIndex:
    place = folder / str(part["folder"])
    opened = open_index(place, verify=verify, effort=effort)
    _check_part(folder, whole, part, opened.manifest, len(opened))
    return opened


def _check_part(folder: Path, whole: Manifest, part: Any, found: Manifest, count: int) -> None:
    if (found.digest, found.type, count) != (part["digest"], whole.type, part["count"]):
        place = folder / str(part["folder"])
        raise StorageError(place, f"is not the part that {folder} was made with; build that index again")
