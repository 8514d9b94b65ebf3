"""Opens an index folder, whatever its type, with its parts and without its deleted documents."""

from pathlib import Path
from typing import Any

from llara.encoding.manifest import check_folder, read_manifest
from llara.errors import StorageError
from llara.index.base import DOCUMENTS, Index, Manifest
from llara.index.bm25 import Bm25Index
from llara.index.faiss import TYPES, Effort, FaissIndex
from llara.index.flat import FlatIndex
from llara.index.parts import PartedIndex
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
    own = [_open_one(folder, manifest, effort)] if manifest.count else []
    if own and not manifest.parts and not manifest.deleted:
        return own[0]
    parts = [_open_part(folder, manifest, each, verify=verify, effort=effort) for each in manifest.parts]
    return PartedIndex(folder, manifest, [*own, *parts])


def _open_one(folder: Path, manifest: Manifest, effort: Effort | None) -> AnyIndex:
    if manifest.type in TYPES:
        return FaissIndex(folder, manifest, effort)
    if manifest.type == "flat":
        return FlatIndex(folder, manifest)
    if manifest.type == "sparse":
        return SparseIndex(folder, manifest)
    if manifest.type == "bm25":
        return Bm25Index(folder, manifest)
    raise StorageError(folder, f"is an index of type {manifest.type!r}, which this version does not know")


def _open_part(folder: Path, whole: Manifest, part: Any, *, verify: bool, effort: Effort | None) -> AnyIndex:
    place = folder / str(part["folder"])
    opened = open_index(place, verify=verify, effort=effort)
    manifest = opened.manifest
    if manifest.digest != part["digest"] or manifest.type != whole.type or len(opened) != part["count"]:
        raise StorageError(place, f"is not the part that {folder} was made with; build that index again")
    return opened
