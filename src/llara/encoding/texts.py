"""Texts by document id, for jobs that are handed a run and a corpus: a document store, found or made for the job."""

import json
from collections.abc import Sequence
from pathlib import Path

from llara.data import read_rows
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import MANIFEST, REJECTED
from llara.encoding.shards import write_documents
from llara.errors import DataError
from llara.files import read_json
from llara.progress import Progress


def open_texts(corpus: Sequence[Path], folder: Path, *, verify: bool = False) -> DocumentStore:
    """Returns the document store of a corpus.

    One folder that `llara encode` or `llara index` made brings its store along. Of anything else a store is made in
    `folder`, in memory that does not grow with the corpus; one that was made there before goes on where it was.

    Raises:
        DataError: The corpus is missing or unreadable, or has a bad row: the first is named.
        StorageError: A folder without a complete store, or a full disk.
    """
    if len(corpus) == 1 and (corpus[0] / MANIFEST).is_file():
        return DocumentStore.open(_store_of(corpus[0]))
    with Progress("read", None, "rows") as shown:
        summary = write_documents(folder, read_rows(corpus), progress=shown, verify=verify)
    if summary.rejected:
        with (folder / REJECTED).open(encoding="utf-8") as file:
            first = json.loads(file.readline())
        raise DataError(first["file"], first["line"], first["reason"])
    return DocumentStore.open(folder)


def _store_of(folder: Path) -> Path:
    """Returns the folder of the store: of an index it is the one that its manifest names."""
    content = read_json(folder / MANIFEST)
    named = content.get("documents") if isinstance(content, dict) and content.get("kind") == "index" else None
    return folder / named if isinstance(named, str) else folder
