"""The numbers of a shard: what an encoder returned is checked, and written beside the documents it belongs to.

    .npy                  vectors [documents, dim], float32 or float16
    .terms.starts.npy     int64 [documents + 1]: where each document's terms start
    .terms.ids.npy        int32 [terms]: token ids
    .terms.weights.npy    float32 [terms], above 0

The three with `terms` are the sparse vectors, and there only where the corpus was encoded with them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llara.encoding.arrays import Array, npy_bytes, write_array
from llara.encoding.engine import Engine, Found
from llara.encoding.manifest import TERMS, VECTORS, Shard
from llara.errors import ModelError, StorageError
from llara.files import FileRecord, free_bytes
from llara.records import Document
from llara.terms import Terms


@dataclass(frozen=True)
class Numbers:
    """What a shard holds beside its documents.

    Attributes:
        engine: Gives float [documents, dim] per shard; with sparse vectors a pair of that and the documents' terms.
        dim: Size of a vector.
        vector_dtype: float32 or float16, the type on disk.
        vocabulary: How many terms there are to choose from; None where no sparse vectors are wanted.
    """

    engine: Engine
    dim: int
    vector_dtype: str
    vocabulary: int | None = None

    def check_room(self, folder: Path, sizes: Iterable[int]) -> None:
        """Looks for the space that the vectors of shards of so many documents take.

        The write reserves its space too; this spares encoding a shard that cannot be kept.

        Raises:
            StorageError: There is too little.
        """
        needs, free = sum(npy_bytes(self._kind, (size, self.dim)) for size in sizes), free_bytes(folder)
        if 0 < free < needs:
            advice = "make room or choose another --output; the same command then goes on where it stopped"
            raise StorageError(folder, f"the next shard needs {needs:,} bytes, {free:,} are free: {advice}")

    def write(self, folder: Path, name: str, documents: list[Document], found: Found) -> dict[str, FileRecord]:
        """Publishes what the engine found for the documents of one shard; returns the record of each file by suffix.

        Raises:
            StorageError: There is no room for the shard.
            ModelError: There is NaN or infinity in it; nothing is published then.
        """
        shape, kind = (len(documents), self.dim), self._kind
        vectors, terms = self._parts(found)
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = vectors.astype(kind, copy=False)
        assert vectors.shape == shape, f"encode returned {vectors.shape} for {shape}"
        advice = "try --dtype float32" if kind.itemsize > 2 else "try --vector-dtype float32"
        _refuse_broken(folder, documents, np.asarray(np.isfinite(vectors).all(axis=1)), "vectors", advice)
        if terms is None:
            return {VECTORS: write_array(folder / f"{name}.{VECTORS}", vectors)}
        self._check_terms(folder, documents, terms)
        files = {VECTORS: vectors, **{TERMS[part]: getattr(terms, part) for part in TERMS}}
        return {suffix: write_array(folder / f"{name}.{suffix}", array) for suffix, array in files.items()}

    def nothing(self) -> Found:
        """Returns the numbers of a shard without documents."""
        vectors = np.zeros((0, self.dim), np.float32)
        return vectors if self.vocabulary is None else (vectors, Terms.of_rows([]))

    @property
    def _kind(self) -> np.dtype[Any]:
        return np.dtype(self.vector_dtype).newbyteorder("<")

    def _parts(self, found: Found) -> tuple[Array, Terms | None]:
        vectors, terms = found if isinstance(found, tuple) else (found, None)
        assert (terms is None) == (self.vocabulary is None), "encode and the folder's identity differ on sparse vectors"
        return np.asarray(vectors), terms

    def _check_terms(self, folder: Path, documents: list[Document], terms: Terms) -> None:
        assert len(terms) == len(documents), f"encode returned terms of {len(terms)} texts for {len(documents)}"
        assert self.vocabulary is not None and not ((terms.ids < 0) | (terms.ids >= self.vocabulary)).any()
        finite = [bool(np.isfinite(terms.of(row)[1]).all()) for row in range(len(documents))]
        _refuse_broken(folder, documents, np.array(finite, np.bool_), "sparse vectors", "try --dtype float32")


def _refuse_broken(folder: Path, documents: list[Document], sound: Array, what: str, advice: str) -> None:
    broken = np.flatnonzero(~sound).tolist()
    if broken:
        named = ", ".join(documents[row].id for row in broken[:5]) + (", ..." if len(broken) > 5 else "")
        told = f"{len(broken)} {what} hold NaN or infinity, of the documents {named}"
        raise ModelError(f"{folder}: {told}; nothing of this shard was kept ({advice})")


def check_terms(folder: Path, shard: Shard, terms: Terms, vocabulary: int) -> None:
    """Looks at every number of a shard's sparse vectors, since what uses them as places would follow them anywhere.

    Raises:
        StorageError: Names the file that is damaged.
    """
    starts = terms.starts
    faults = {
        "starts": starts[0] != 0 or starts[-1] != len(terms.ids) or bool((starts[1:] < starts[:-1]).any()),
        "ids": bool(((terms.ids < 0) | (terms.ids >= vocabulary)).any()),
        "weights": not bool(((terms.weights > 0) & (terms.weights < np.inf)).all()),
    }
    for part, damaged in faults.items():
        if damaged:
            reason = "is damaged: holds numbers that no encoder wrote; run llara verify on the folder"
            raise StorageError(shard.path(folder, TERMS[part]), reason)
