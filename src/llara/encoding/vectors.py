"""Reads a complete vectors folder: its vectors, sparse vectors, and which part of which document each of them is of."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from llara.encoding.arrays import Array
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import (
    CUT,
    SPARSE,
    check_folder,
    count_rows,
    open_passages,
    open_sidecar,
    open_terms,
    open_vectors,
    read_manifest,
)
from llara.encoding.numbers import check_terms
from llara.errors import StorageError
from llara.files import json_bytes
from llara.terms import Terms


class Vectors:
    """Reads a complete vectors folder; make one with `open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.identity: dict[str, Any] = manifest["identity"]
        self.dim: int = self.identity["dim"]
        self.documents = DocumentStore(folder, manifest)

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> Self:
        """Opens a vectors folder after checking manifest, sidecars, sizes and headers; `verify`: all checksums too.

        StorageError names the file that is missing or damaged, or says how to complete the folder.
        """
        manifest = read_manifest(folder, "vectors")
        for error in check_folder(folder, manifest, full=verify):
            raise error
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what decides the vectors and over the shards; the folder's path and config.toml do not count."""
        decides = {key: self.manifest[key] for key in ("format", "kind", "identity", "shards")}
        return hashlib.sha256(json_bytes(decides)).hexdigest()

    @property
    def cut(self) -> bool:
        """Whether long documents were cut, so that a vector is a passage's."""
        return CUT in self.identity

    def count_rows(self) -> int:
        """Returns how many vectors there are: one per document, or per passage."""
        if not self.cut:
            return len(self)
        return sum(count_rows(open_sidecar(self.folder, entry)) for entry in self.manifest["shards"])

    def passages(self) -> Iterator[Array]:
        """Yields for each shard in order which passages its vectors are of, int64 [rows, 3].

        The columns are the position of the document in the folder, and the characters where the passage starts and
        stops in its text.
        """
        documents = 0
        for entry in self.manifest["shards"]:
            table = np.array(open_passages(self.folder, open_sidecar(self.folder, entry)))
            table[:, 0] += documents
            yield table
            documents += entry["documents"]

    def shards(self) -> Iterator[Array]:
        """Yields the vectors of each shard in order, [rows, dim], memory-mapped and read-only."""
        for entry in self.manifest["shards"]:
            yield open_vectors(self.folder, self.manifest, entry)

    def sparse_settings(self) -> dict[str, Any]:
        """Returns the settings of the sparse vectors; StorageError where the folder holds none."""
        if SPARSE not in self.identity:
            advice = "encode the corpus with --sparse into another folder"
            raise StorageError(self.folder, f"holds no sparse vectors; {advice}")
        return dict(self.identity[SPARSE])

    def terms(self) -> Iterator[Terms]:
        """Yields the sparse vectors of each shard in order, memory-mapped; StorageError where the folder holds none."""
        vocabulary = self.sparse_settings()["vocabulary"]
        for entry in self.manifest["shards"]:
            shard = open_sidecar(self.folder, entry)
            terms = open_terms(self.folder, shard)
            check_terms(self.folder, shard, terms, vocabulary)
            yield terms

    def count_terms(self) -> int:
        """Returns how many terms all documents have together; StorageError where the folder holds no sparse vectors."""
        self.sparse_settings()
        shards = (open_sidecar(self.folder, entry) for entry in self.manifest["shards"])
        return sum(len(open_terms(self.folder, shard).ids) for shard in shards)

    def ids(self, position: int) -> str:
        """Returns the id of the document at a position; `documents.ids` gives many at once."""
        return self.documents.id(position)


def verify_vectors(folder: Path) -> list[str]:
    """Recomputes every checksum of a vectors or documents folder; returns one message per damaged file."""
    try:
        manifest = read_manifest(folder)
    except StorageError as error:
        return [str(error)]
    return [str(error) for error in check_folder(folder, manifest, full=True)]
