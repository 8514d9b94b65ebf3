"""The job `index`: vectors, or words, become an index folder. Also opens one, whatever its type."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llara import progress
from llara.config import IndexConfig, to_toml
from llara.config.indexing import READ_BY
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
from llara.files import (
    IDENTITY,
    FileRecord,
    FolderLock,
    claim_output,
    disk_errors,
    remove_leftovers,
    sha256_file,
    write_atomic,
)
from llara.index.base import DOCUMENTS, MANIFEST, Manifest, write_ids
from llara.index.bm25 import check_language, write_bm25
from llara.index.flat import write_flat
from llara.index.milvus import check_uri, choose_place, write_milvus
from llara.index.opening import open_index
from llara.index.parts import PART, covered, cut_shards, read_deleted, vectors_fingerprint
from llara.index.passages import write_passages
from llara.index.shape import TYPES, Shape, write_faiss
from llara.index.sparse import PASSES, write_sparse
from llara.invocation import shell_line
from llara.outputs import check_place
from llara.terms import Terms

CONFIG = "config.toml"
MEMORY = 2 << 30  # bytes that building an approximate index takes, about, before it is cut into parts


@dataclass(frozen=True)
class IndexResult:
    """What `build_index` left in the folder; `reused` tells that it was there already."""

    output: Path
    type: str
    documents: int
    rejected: int
    bytes: int
    reused: bool


class Source(NamedTuple):
    """What an index is built from. `vectors` is None where words are all that is needed."""

    folder: Path
    store: DocumentStore
    vectors: Vectors | None
    fingerprint: str
    rejected: int
    start: int = 0
    """Documents of the index that come before."""


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
    if vectors is not None and vectors.cut and config.type == "milvus":
        advice = "take another --type, or encode the corpus with --long truncate"
        raise StorageError(vectors.folder, f"holds several passages of a document, --type milvus takes one; {advice}")
    if vectors is not None and config.type == "sparse":
        vectors.sparse_settings()
    if config.uri is not None and not (config.output / MANIFEST).exists():
        check_uri(config.uri, config.output)
    next(read_rows(config.corpus) if config.corpus else iter(()), None)
    check_place(config.output)
    with FolderLock(config.output):
        identity: dict[str, Any] = {"type": config.type}
        decides = [name for types, names in READ_BY.items() if config.type in types for name in names]
        identity |= {name: getattr(config, name) for name in decides}
        finished = claim_output(config.output, identity, "index") and (config.output / MANIFEST).exists()
        remove_leftovers(config.output)
        source = open_source(config, vectors, finished)
        if finished:
            return _reuse(config, source)
        return _build(config, source)


def open_source(config: IndexConfig, vectors: Vectors | None, finished: bool) -> Source:
    """Returns what the index is built from; a corpus is stored first, where there is no `finished` index of it."""
    if vectors is not None:
        # Words depend on the corpus alone, so that BM25 stays what it is when another model encodes the same corpus.
        words = config.type == "bm25"
        source = Source(
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
        source = Source(folder, DocumentStore(folder, manifest), None, manifest["corpus"], manifest["rejected"])
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


def _reuse(config: IndexConfig, source: Source) -> IndexResult:
    manifest = Manifest.read(config.output, verify=config.verify)
    if manifest.source != source.fingerprint:
        what = f"was built from other documents or vectors than {source.folder} holds now"
        advice = "choose another --output, or delete this folder to start again"
        vectors = source.vectors
        if vectors and covered(source.store.entries, manifest.total, manifest.source, vectors_fingerprint(vectors)):
            what = f"lacks {len(source.store) - manifest.total:,} documents that {source.folder} has got since"
            words = ["index", "--add", "--vectors", source.folder, "--output", config.output]
            advice = f"add them with: {shell_line(words)}"
        raise StorageError(config.output, f"{what}; {advice}")
    if vars(manifest) != vars(manifest) | places(config.output, source, manifest.model_path):
        # the same vectors, or their model, in another place
        replace(manifest, **places(config.output, source, manifest.model_path)).publish(config.output)
    progress.note(f"{config.output}: nothing to do, this index is finished")
    return result(config, manifest, source.rejected, reused=True)


def places(output: Path, source: Source, model: str = "") -> dict[str, Any]:
    """Returns where documents and model lie from `output`; `model` is what the manifest says of it so far."""
    if not model or not is_local(find_model(model, output)):
        model = _model_path(source, output)
    return {"documents": relative_path(source.folder, output), "model_path": model}


def _build(config: IndexConfig, source: Source) -> IndexResult:
    output = config.output
    own, *others = cut(config, source)
    manifest = fill(config, own, output)
    parts = [fill_part(config, part, output, number) for number, part in enumerate(others, 1)]
    files = dict(manifest.files)
    files[CONFIG] = write_atomic(output / CONFIG, to_toml(config).encode())
    files[IDENTITY] = FileRecord((output / IDENTITY).stat().st_size, sha256_file(output / IDENTITY))
    manifest = replace(manifest, source=source.fingerprint, files=files, parts=parts)
    manifest.publish(output)
    open_index(output)  # what cannot be opened must fail here, not at the first search
    return result(config, manifest, source.rejected, reused=False)


def cut(config: IndexConfig, source: Source) -> list[Source]:
    """Returns what goes into each part of an index: all into one where the type needs no memory for it."""
    if source.vectors is None or config.type not in TYPES:
        return [source]
    size = documents_per_part(config, len(source.store), source.vectors.count_rows(), source.vectors.dim)
    return [
        source._replace(store=part.documents, vectors=part, fingerprint=part.fingerprint)
        for part in cut_shards(source.vectors, size)
    ]


def documents_per_part(config: IndexConfig, documents: int, rows: int, dim: int) -> int:
    """Returns how many documents are indexed together in memory, of so many with `rows` vectors of dimension `dim`.

    ConfigError where a parameter does not fit the vectors.
    """
    shape = Shape.of(config, rows, dim)
    return config.part_size or max(1, MEMORY // shape.bytes_per_vector * documents // rows)


def kept_dtype(vectors: Vectors) -> str:
    """Returns the type in which an approximate index keeps vectors: of those in 8 bits what they stand for.

    A score is then that of a flat index.
    """
    return str(vectors.identity["vector_dtype"]).replace("int8", "float32")


def fill(config: IndexConfig, source: Source, folder: Path) -> Manifest:
    """Writes the files of one part; returns its manifest, which is still to be published."""
    files = write_ids(folder, _ids(source.store), source.store.ids_bytes())
    if source.vectors is not None and source.vectors.cut:
        files |= write_passages(folder, source.vectors)
    made, settings = _write(config, source, folder)
    return Manifest(
        type=config.type,
        count=len(source.store),
        settings=settings,
        model=source.vectors.identity if source.vectors else None,
        source=source.fingerprint,
        files=files | made,
        **places(folder, source),
    )


def fill_part(config: IndexConfig, source: Source, output: Path, number: int) -> Mapping[str, Any]:
    """Makes a part in a folder of its own, or finds it made; returns how the index folder's manifest names it."""
    folder = output / PART.format(number)
    manifest = _finished_part(folder, source)
    if manifest is None:
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            (folder / MANIFEST).unlink(missing_ok=True)
        remove_leftovers(folder)
        fill(config, source, folder).publish(folder)
        manifest = Manifest.read(folder)
    return {"folder": folder.name, "count": manifest.count, "digest": manifest.digest}


def _finished_part(folder: Path, source: Source) -> Manifest | None:
    """Returns the manifest of a part that a run before this one finished; None where there is none to keep."""
    try:
        manifest = Manifest.read(folder, verify=True)
    except StorageError:
        return None  # whatever is there is made anew
    return manifest if manifest.source == source.fingerprint else None


def _write(config: IndexConfig, source: Source, folder: Path) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the files of the type; returns their records and the settings."""
    vectors = source.vectors
    if vectors is not None and config.type == "sparse":
        return write_sparse(folder, _Passes(vectors), vectors.sparse_settings()["vocabulary"])
    count = len(source.store) if vectors is None else vectors.count_rows()
    with progress.Progress("index", count, _unit(vectors)) as shown:
        if vectors is not None and config.type in TYPES:
            shape = Shape.of(config, count, vectors.dim)
            return write_faiss(folder, vectors.shards(), count, kept_dtype(vectors), shape, shown)
        if vectors is not None and config.type == "milvus":
            place = _milvus_place(config, source)
            shards = vectors.shards()
            return {}, write_milvus(config.output, shards, place, vectors.dim, source.start, shown)
        if vectors is not None:
            return write_flat(folder, _shards(vectors.shards(), shown), count, vectors.dim)
        documents = (_counted(each, shown) for each in source.store.iter_documents())
        return write_bm25(folder, documents, config.k1, config.b, config.language)


def _milvus_place(config: IndexConfig, source: Source) -> dict[str, Any]:
    if source.start:  # added to what is there
        return dict(Manifest.read(config.output).settings)
    return choose_place(config.output, config.uri, config.collection, config.milvus_index, source.fingerprint)


class _Passes:
    """Gives the sparse vectors of a folder, shard by shard, as often as they are asked for."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors, self.number = vectors, 0

    def __call__(self) -> Iterator[Terms]:
        self.number += 1
        label, count = f"index, pass {self.number} of {PASSES}", self.vectors.count_rows()
        with progress.Progress(label, count, _unit(self.vectors)) as shown:
            yield from _shards(self.vectors.terms(), shown)


def _unit(vectors: Vectors | None) -> str:
    return "passages" if vectors is not None and vectors.cut else "documents"


def _model_path(source: Source, output: Path) -> str:
    if source.vectors is None:
        return ""
    found = find_model(source.vectors.manifest["about"].get("model_path", ""), source.folder)
    return record_model(found, output) if Path(found).is_absolute() else found


def result(config: IndexConfig, manifest: Manifest, rejected: int, *, reused: bool) -> IndexResult:
    """Returns what the job found or left in the folder."""
    folders = [config.output, *(config.output / part["folder"] for part in manifest.parts)]
    manifests = [manifest, *(Manifest.read(folder) for folder in folders[1:])]
    size = sum(record.bytes for each in manifests for record in each.files.values())
    documents = manifest.total - len(read_deleted(config.output, manifest))
    return IndexResult(config.output, manifest.type, documents, rejected, size, reused)


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
