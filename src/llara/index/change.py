"""Changes to a finished index: documents are added as a new part, and deleted ones are left out of every search.

What is there is not built again, but for bm25: its scores depend on how often a word stands in the whole corpus. A
change is complete when the manifest is published. Until then the folder opens as it was, and whatever a run that was
killed has left behind is found, or made anew, by the next one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llara import progress
from llara.config import IndexConfig
from llara.encoding.manifest import corpus_digest
from llara.encoding.shards import Vectors
from llara.errors import DataError, StorageError
from llara.files import IDENTITY, FolderLock, disk_errors, read_json, remove_leftovers
from llara.index.base import Manifest, Positions
from llara.index.build import CONFIG, IndexResult, Source, cut, fill_part, open_source, places, result
from llara.index.milvus import delete_from_milvus
from llara.index.opening import open_index
from llara.index.parts import MANY, covered, id_lines, part_of, read_deleted, vectors_fingerprint, write_deleted

_NAMED = 5  # unknown ids that a message names


def add_documents(config: IndexConfig) -> IndexResult:
    """Adds the documents that a vectors folder, or a corpus, has got at its end since the index was built.

    Raises:
        DataError: The corpus cannot be read.
        StorageError: The folder is no index, or was built from something else than the beginning of what is given.
    """
    vectors = Vectors.open(config.vectors, config.verify) if config.vectors else None
    Manifest.read(config.output)  # where there is no index, no folder is made
    with FolderLock(config.output):
        manifest = Manifest.read(config.output, verify=config.verify)
        config = _as_built(config, manifest)
        remove_leftovers(config.output)
        source = open_source(config, vectors, finished=False)
        new = _new_documents(config, manifest, source)
        if new is None:
            progress.note(f"{config.output}: nothing to do, it holds all these documents")
            return result(config, manifest, source.rejected, reused=True)
        number = 1 + max((int(part["folder"].rpartition("-")[2]) for part in manifest.parts), default=0)
        made = [fill_part(config, each, config.output, number + at) for at, each in enumerate(cut(config, new))]
        where = places(config.output, source, manifest.model_path)
        changed = replace(manifest, source=source.fingerprint, parts=[*manifest.parts, *made], **where)
        if source.vectors is None:  # the new part holds all documents, and stands for whatever was there
            kept = {name: manifest.files[name] for name in (CONFIG, IDENTITY, manifest.deleted) if name}
            changed = replace(changed, count=0, settings={}, files=kept, parts=made)
        return _publish(config, manifest, changed, source.rejected)


def delete_documents(config: IndexConfig) -> IndexResult:
    """Deletes the documents whose ids a file names, one on each line.

    Raises:
        DataError: A line names no document; nothing is deleted then.
        StorageError: The folder is no index, or no document would be left.
    """
    assert config.delete is not None, "the configuration checks itself"
    wanted = _read_ids(config.delete)
    Manifest.read(config.output)
    with FolderLock(config.output):
        manifest = Manifest.read(config.output, verify=config.verify)
        remove_leftovers(config.output)
        before = read_deleted(config.output, manifest)
        deleted = np.union1d(before, _positions(config, manifest, wanted))
        if len(deleted) == len(before):
            progress.note(f"{config.output}: nothing to do, these documents were deleted before")
            return result(config, manifest, 0, reused=True)
        if len(deleted) == manifest.total:
            raise StorageError(config.output, "no document would be left; delete the folder instead")
        name, record = write_deleted(config.output, manifest, deleted)
        files = {each: file for each, file in manifest.files.items() if each != manifest.deleted}
        found = _publish(config, manifest, replace(manifest, deleted=name, files={**files, name: record}), 0)
        if manifest.type == "milvus":  # only now: a run that is stopped here has deleted them for every search
            delete_from_milvus(config.output, manifest, deleted)
        return found


def _publish(config: IndexConfig, old: Manifest, new: Manifest, rejected: int) -> IndexResult:
    """Publishes the changed manifest, and removes what it no longer names."""
    new.publish(config.output)
    open_index(config.output)  # what cannot be opened must fail here, not at the first search
    with disk_errors(config.output):
        for name in old.files.keys() - new.files.keys():
            (config.output / name).unlink(missing_ok=True)
        for name in {part["folder"] for part in old.parts} - {part["folder"] for part in new.parts}:
            for path in (config.output / name).iterdir():
                path.unlink()
            (config.output / name).rmdir()
    if len(new.parts) >= MANY:
        what = f"has {len(new.parts) + 1} parts, which a search goes through one after the other"
        progress.note(f"{config.output}: {what}; a new index of the same vectors is searched faster")
    return result(config, new, rejected, reused=False)


def _as_built(config: IndexConfig, manifest: Manifest) -> IndexConfig:
    """Returns the configuration with the type and the parameters that the folder was claimed for."""
    claimed = read_json(config.output / IDENTITY)
    identity = claimed.get("identity") if isinstance(claimed, dict) else None
    if not isinstance(identity, dict) or identity.get("type") != manifest.type:
        raise StorageError(config.output / IDENTITY, "is damaged: it does not fit the index")
    if manifest.type != "bm25" and config.corpus:
        raise StorageError(config.output, f"is a {manifest.type} index; add to it from --vectors")
    return replace(config, add=False, **identity)


def _new_documents(config: IndexConfig, manifest: Manifest, source: Source) -> Source | None:
    """Returns what the index lacks; None where it lacks nothing."""
    if manifest.source == source.fingerprint:
        return None
    of_what: Callable[[Sequence[Mapping[str, Any]]], str] = corpus_digest
    if source.vectors is not None:
        of_what = vectors_fingerprint(source.vectors)
    entries = source.store.entries
    number = covered(entries, manifest.total, manifest.source, of_what)
    if number is None:
        what = f"was built from something else than the first documents of {source.folder}"
        if source.vectors is not None and manifest.model != source.vectors.identity:
            what = f"was built from vectors of another model, or made with other settings, than {source.folder}"
        raise StorageError(config.output, f"{what}; build a new index of it")
    if source.vectors is None:
        return source
    tail = part_of(source.vectors, number, len(entries))
    return source._replace(store=tail.documents, vectors=tail, fingerprint=tail.fingerprint, start=manifest.total)


def _read_ids(path: Path) -> dict[bytes, int]:
    """Returns the ids in a file, and the line of each."""
    found: dict[bytes, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.setdefault(line.rstrip(b"\r\n"), number)
    except OSError as error:
        raise DataError(path, None, f"cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError(path, None, "names no document; it takes one id on each line")
    return found


def _positions(config: IndexConfig, manifest: Manifest, wanted: dict[bytes, int]) -> Positions:
    """Returns where the documents stand. Reads the ids once from first to last, since few are asked for."""
    assert config.delete is not None
    missing, positions = dict(wanted), []
    for position, line in enumerate(id_lines(config.output, manifest)):
        if missing.pop(line[:-1], None) is not None:
            positions.append(position)
    if missing:
        line_number = next(iter(missing.values()))
        named = ", ".join(repr(each.decode("utf-8", "replace")) for each in list(missing)[:_NAMED])
        more = ", ..." if len(missing) > _NAMED else ""
        what = f"the index has no document {named}{more} ({len(missing):,} of {len(wanted):,} ids)"
        raise DataError(config.delete, line_number, f"{what}; nothing was deleted")
    return np.array(positions, np.int64)
