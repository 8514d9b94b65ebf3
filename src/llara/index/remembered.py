"""What filters found, kept in the index folder: the next process reads the answer instead of every document.

    filters/<digest>    SHA-256 of the rest; a line of JSON with `total` and `notes`; one bit for each document

The name is a digest of the conditions, of the index' manifest and of the documents, so whatever changes in these is
another name. The files are a convenience and no part of the index: they are in no manifest, one that is damaged counts
as missing, and where none can be written, the documents are read again.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llara import progress
from llara.conditions import Condition
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import corpus_digest
from llara.errors import StorageError
from llara.files import json_bytes, write_atomic
from llara.index.base import Allowed, Ids, Manifest
from llara.index.filters import Answer, find_allowed
from llara.index.parts import all_deleted, live_documents

FOLDER = "filters"
KEPT = 32  # answers; the oldest are removed
_FORMAT = 1  # of the files, and of what a condition means
_DIGEST = hashlib.sha256().digest_size


def allowed_documents(
    conditions: Sequence[Condition], folder: Path, manifest: Manifest, store: DocumentStore, ids: Ids
) -> Allowed:
    """Returns which documents of the index in `folder` fit all conditions; deleted ones fit none.

    Notes say what was passed over. `store` holds the documents that the index was built from, `ids` are those of the
    index.

    Raises:
        ConfigError: No document has a field of a condition, or a value of its type there.
        StorageError: The store is damaged, or holds other documents than the index.
    """
    path = folder / FOLDER / _name(conditions, manifest, store)
    answer = _read(path, len(ids))
    if answer is None:
        deleted = all_deleted(folder, manifest)
        live = live_documents(deleted, len(ids)) if len(deleted) else None
        answer = find_allowed(conditions, store, ids, live)
        # An index may lie where nobody can write, or where nothing is left: then this took the time that it takes.
        with contextlib.suppress(StorageError, OSError):
            _write(path, answer)
    for note in answer.notes:
        progress.note(note)
    return answer.allowed


def _name(conditions: Sequence[Condition], manifest: Manifest, store: DocumentStore) -> str:
    asked = [[each.text, each.field, each.operator, list(each.values)] for each in conditions]
    return hashlib.sha256(json_bytes([_FORMAT, asked, manifest.digest, corpus_digest(store.entries)])).hexdigest()


def _read(path: Path, total: int) -> Answer | None:
    """Returns an answer that was kept; None where there is none, or where it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, content = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    head, _, bits = content.partition(b"\n")
    said = json.loads(head)
    if said["total"] != total or len(bits) != -(-total // 8):
        return None
    return Answer(Allowed(np.frombuffer(bits, np.uint8), total), tuple(said["notes"]))


def _write(path: Path, answer: Answer) -> None:
    said = {"total": answer.allowed.total, "notes": list(answer.notes)}
    content = json.dumps(said).encode() + b"\n" + answer.allowed.bits.tobytes()
    write_atomic(path, hashlib.sha256(content).digest() + content)
    # With what a process that was killed left under a temporary name.
    there = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_mtime_ns, reverse=True)
    for old in there[KEPT:]:
        old.unlink(missing_ok=True)
