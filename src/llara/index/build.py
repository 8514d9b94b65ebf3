"""The job `index`: vectors, or words, become an index folder. Also opens one, whatever its type."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llara import progress
from llara.config import IndexConfig, to_toml
from llara.data import read_rows
from llara.encoding.documents import DocumentStore
from llara.encoding.intake import digest_rows
from llara.encoding.manifest import (
    check_folder,
    find_model,
    is_local,
    read_manifest,
    read_sealed,
    record_model,
    relative_path,
)
from llara.encoding.shards import Vectors, write_documents
from llara.errors import DataError, StorageError
from llara.files import IDENTITY, FileRecord, FolderLock, claim_output, remove_leftovers, sha256_file, write_atomic
from llara.index.base import DOCUMENTS, MANIFEST, Manifest, write_ids
from llara.index.bm25 import Bm25Index, check_language, write_bm25
from llara.index.flat import FlatIndex, write_flat
from llara.index.sparse import PASSES, SparseIndex, write_sparse
from llara.outputs import check_place
from llara.terms import Terms

CONFIG = "config.toml"
AnyIndex = FlatIndex | SparseIndex | Bm25Index


@dataclass(frozen=True)
class IndexResult:
    """What `build_index` left in the folder; `reused` tells that it was there already."""

    output: Path
    type: str
    documents: int
    rejected: int
    bytes: int
    reused: bool


class _Source(NamedTuple):
    """What an index is built from. `vectors` is None where words are all that is needed."""

    folder: Path
    store: DocumentStore
    vectors: Vectors | None
    fingerprint: str
    rejected: int


def build_index(config: IndexConfig) -> IndexResult:
    """Builds an index folder; one that was built from the same is left as it is.

    Bad rows of `config.corpus` are skipped, counted, and listed in `documents/rejected.jsonl`.

    Raises:
        ConfigError: A language that has no stemmer.
        DataError: A corpus file is missing, empty or unreadable, or there is nothing to index.
        StorageError: A full disk, damage, a second writer, or a folder that belongs to another configuration.
    """
    if config.type == "bm25":
        check_language(config.language)
    # What can be found wrong with the input must be found before the output folder is claimed.
    vectors = Vectors.open(config.vectors, config.verify) if config.vectors else None
    if vectors is not None and config.type == "sparse":
        vectors.sparse_settings()
    next(read_rows(config.corpus) if config.corpus else iter(()), None)
    check_place(config.output)
    with FolderLock(config.output):
        identity: dict[str, Any] = {"type": config.type}
        if config.type == "bm25":
            identity |= {"k1": config.k1, "b": config.b, "language": config.language}
        finished = claim_output(config.output, identity, "index") and (config.output / MANIFEST).exists()
        remove_leftovers(config.output)
        source = _open_source(config, vectors, finished)
        if finished:
            return _reuse(config, source)
        return _build(config, source)


def open_index(folder: Path, *, verify: bool = False) -> AnyIndex:
    """Opens an index folder, memory-mapped, after checking the sizes of its files; with `verify` their SHA-256 too.

    The documents of an index that was built from a corpus lie in its folder, and are checked with it.

    StorageError for a folder that is missing, damaged, or no index.
    """
    manifest = Manifest.read(folder, verify=verify)
    if manifest.documents == DOCUMENTS:
        for error in check_folder(folder / DOCUMENTS, read_manifest(folder / DOCUMENTS), full=False):
            raise error
    if manifest.type == "flat":
        return FlatIndex(folder, manifest)
    if manifest.type == "sparse":
        return SparseIndex(folder, manifest)
    if manifest.type == "bm25":
        return Bm25Index(folder, manifest)
    raise StorageError(folder, f"is an index of type {manifest.type!r}, which this version does not know")


def _open_source(config: IndexConfig, vectors: Vectors | None, finished: bool) -> _Source:
    if vectors is not None:
        # Words depend on the corpus alone, so that BM25 stays what it is when another model encodes the same corpus.
        words = config.type == "bm25"
        source = _Source(
            vectors.folder,
            vectors.documents,
            None if words else vectors,
            str(vectors.manifest["corpus"]) if words else vectors.fingerprint,
            vectors.manifest["rejected"],
        )
    else:
        with progress.Progress("read", None, "rows") as shown:
            folder = _finished_documents(config, shown) if finished else None
            if folder is None:
                folder = config.output / DOCUMENTS
                write_documents(folder, read_rows(config.corpus), progress=shown, verify=config.verify)
        manifest = read_manifest(folder)
        source = _Source(folder, DocumentStore(folder, manifest), None, manifest["corpus"], manifest["rejected"])
    if not len(source.store):
        raise DataError(source.folder, None, f"holds no document to index ({source.rejected} rows were rejected)")
    return source


def _finished_documents(config: IndexConfig, shown: progress.Progress) -> Path | None:
    """Returns the documents of a finished index where they are sound; None where they are to be repaired.

    A corpus that is no longer the one they were made from is a `StorageError`, and nothing has been written by then:
    the index stays as good as it was.
    """
    folder = config.output / Manifest.read(config.output).documents
    content = read_sealed(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    if content.get("state") != "complete":
        return None
    if not _holds(content, config, shown):
        what = "is complete for the corpus as it was, and the corpus has changed since"
        raise StorageError(config.output, f"{what}; choose another --output, or delete this folder to start again")
    return None if any(check_folder(folder, content, full=False)) else folder


def _holds(content: Mapping[str, Any], config: IndexConfig, shown: progress.Progress) -> bool:
    """Tells whether the manifest of a document store speaks of these rows and no others."""
    rows, start = read_rows(config.corpus), 0
    for entry in content["shards"]:
        batch = list(itertools.islice(rows, entry["end"] - start))
        if digest_rows(batch) != entry["source"]:
            return False
        shown.advance(len(batch))
        start = entry["end"]
    return next(rows, None) is None


def _reuse(config: IndexConfig, source: _Source) -> IndexResult:
    manifest = Manifest.read(config.output, verify=config.verify)
    if manifest.source != source.fingerprint:
        what = f"was built from other documents or vectors than {source.folder} holds now"
        raise StorageError(config.output, f"{what}; choose another --output, or delete this folder to start again")
    model = manifest.model_path
    if not is_local(find_model(model, config.output)):
        model = _model_path(source, config.output)
    places = {"documents": relative_path(source.folder, config.output), "model_path": model}
    if vars(manifest) != vars(manifest) | places:  # the same vectors, or their model, in another place
        Manifest(**vars(manifest) | places).publish(config.output)
    progress.note(f"{config.output}: nothing to do, this index is finished")
    return _result(config, manifest, source, reused=True)


def _build(config: IndexConfig, source: _Source) -> IndexResult:
    output, count = config.output, len(source.store)
    files = write_ids(output, _ids(source.store), source.store.ids_bytes())
    made, settings = _write(config, source)
    files |= made
    files[CONFIG] = write_atomic(output / CONFIG, to_toml(config).encode())
    files[IDENTITY] = FileRecord((output / IDENTITY).stat().st_size, sha256_file(output / IDENTITY))
    manifest = Manifest(
        type=config.type,
        count=count,
        settings=settings,
        model=source.vectors.identity if source.vectors else None,
        model_path=_model_path(source, output),
        source=source.fingerprint,
        documents=relative_path(source.folder, output),
        files=files,
    )
    manifest.publish(output)
    open_index(output)  # what cannot be opened must fail here, not at the first search
    return _result(config, manifest, source, reused=False)


def _write(config: IndexConfig, source: _Source) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the files of the type; returns their records and the settings."""
    vectors, count = source.vectors, len(source.store)
    if vectors is not None and config.type == "sparse":
        return write_sparse(config.output, _Passes(vectors), vectors.sparse_settings()["vocabulary"])
    with progress.Progress("index", count, "documents") as shown:
        if vectors is not None:
            return write_flat(config.output, _shards(vectors.shards(), shown), count, vectors.dim)
        documents = (_counted(each, shown) for each in source.store.iter_documents())
        return write_bm25(config.output, documents, config.k1, config.b, config.language)


class _Passes:
    """Gives the sparse vectors of a folder, shard by shard, as often as they are asked for."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors, self.number = vectors, 0

    def __call__(self) -> Iterator[Terms]:
        self.number += 1
        with progress.Progress(f"index, pass {self.number} of {PASSES}", len(self.vectors), "documents") as shown:
            yield from _shards(self.vectors.terms(), shown)


def _model_path(source: _Source, output: Path) -> str:
    if source.vectors is None:
        return ""
    found = find_model(source.vectors.manifest["about"].get("model_path", ""), source.folder)
    return record_model(found, output) if Path(found).is_absolute() else found


def _result(config: IndexConfig, manifest: Manifest, source: _Source, *, reused: bool) -> IndexResult:
    size = sum(record.bytes for record in manifest.files.values())
    return IndexResult(config.output, manifest.type, manifest.count, source.rejected, size, reused)


def _ids(store: DocumentStore, step: int = 10_000) -> Iterator[str]:
    for start in range(0, len(store), step):
        yield from store.ids(start, start + step)


def _shards(shards: Iterable[Any], shown: progress.Progress) -> Iterator[Any]:
    for shard in shards:
        yield shard
        shown.advance(len(shard))


def _counted(item: Any, shown: progress.Progress) -> Any:
    shown.advance()
    return item
