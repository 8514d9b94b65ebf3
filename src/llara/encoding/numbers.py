"""The numbers of a shard: what an encoder returned is checked, and written beside the documents it belongs to.

    .npy                  vectors [documents, dim], float32, float16 or int8
    .scales.npy           float32 [documents]: of int8 vectors, what each is multiplied by
    .passages.npy         int64 [passages, 3], where long documents were cut: there, and below, rows are passages
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
from llara.encoding.engine import Encoded as Encoded
from llara.encoding.engine import Engine, Found
from llara.encoding.manifest import PASSAGES, SCALES, TERMS, VECTORS, Shard
from llara.errors import ModelError, StorageError
from llara.files import FileRecord, free_bytes
from llara.records import Document
from llara.terms import Terms


@dataclass(frozen=True)
class Numbers:
    """What a shard holds beside its documents.

    Attributes:
        engine: Gives float [documents, dim] per shard; with sparse vectors a pair of that and the documents' terms;
            where long documents are cut, what `Encoded` says.
        dim: Size of a vector.
        vector_dtype: float32, float16 or int8, the type on disk.
        vocabulary: How many terms there are to choose from; None where no sparse vectors are wanted.
        cut: Whether long documents are cut.
    """

    engine: Engine
    dim: int
    vector_dtype: str
    vocabulary: int | None = None
    cut: bool = False

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
        kind = self._kind
        vectors, terms, passages = self._parts(found)
        with np.errstate(over="ignore", invalid="ignore"):
            vectors = vectors.astype(np.float32 if kind.kind == "i" else kind, copy=False)
        shape = (len(documents if passages is None else passages), self.dim)
        assert vectors.shape == shape, f"encode returned {vectors.shape} for {shape}"
        named = documents if passages is None else [documents[number] for number in passages[:, 0].tolist()]
        advice = "try --vector-dtype float32" if kind == np.float16 else "try --dtype float32"
        _refuse_broken(folder, named, np.asarray(np.isfinite(vectors).all(axis=1)), "vectors", advice)
        files = {VECTORS: vectors} | ({} if passages is None else {PASSAGES: passages.astype("<i8")})
        if kind.kind == "i":
            files[VECTORS], files[SCALES] = round_vectors(vectors)
        if terms is not None:
            self._check_terms(folder, named, terms)
            files |= {TERMS[part]: getattr(terms, part) for part in TERMS}
        return {suffix: write_array(folder / f"{name}.{suffix}", array) for suffix, array in files.items()}

    def nothing(self) -> Encoded:
        """Returns the numbers of a shard without documents."""
        terms = None if self.vocabulary is None else Terms.of_rows([])
        return Encoded(np.zeros((0, self.dim), np.float32), terms, np.zeros((0, 3), np.int64) if self.cut else None)

    @property
    def _kind(self) -> np.dtype[Any]:
        return np.dtype(self.vector_dtype).newbyteorder("<")

    def _parts(self, found: Found) -> Encoded:
        vectors, terms, passages = Encoded(*found) if isinstance(found, tuple) else Encoded(found)
        assert (terms is None) == (self.vocabulary is None), "encode and the folder's identity differ on sparse vectors"
        assert (passages is None) != self.cut, "encode and the folder's identity differ on passages"
        return Encoded(np.asarray(vectors), terms, passages)

    def _check_terms(self, folder: Path, documents: list[Document], terms: Terms) -> None:
        assert len(terms) == len(documents), f"encode returned terms of {len(terms)} texts for {len(documents)}"
        assert self.vocabulary is not None and not ((terms.ids < 0) | (terms.ids >= self.vocabulary)).any()
        finite = [bool(np.isfinite(terms.of(row)[1]).all()) for row in range(len(documents))]
        _refuse_broken(folder, documents, np.array(finite, np.bool_), "sparse vectors", "try --dtype float32")


def round_vectors(vectors: Array) -> tuple[Array, Array]:
    """Rounds float32 [n, dim] to int8 -127 to 127; returns it, and what to multiply each row by, float32 [n]."""
    scales = np.maximum(np.abs(vectors).max(axis=1, initial=0.0) / np.float32(127), np.finfo(np.float32).tiny)
    return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)


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
