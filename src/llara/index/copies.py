"""Documents with equal vectors, which a graph holds once.

    copies.npy      int64 [copies, 2], where there are any: the position of each document whose vector an earlier
                    document has, rising, and the number of that vector

Copies in a graph are as near to each other as can be, so each spends its links on the others: the walk finds its way
neither into them nor out of them. So each vector is linked once, numbered in the order of the documents that have it
first, and a hit on it stands for all of its documents. Of 16,407 documents of MedQuAD with 618 copies, a graph over all
found 0.969 of the ten best, and this one finds 0.995.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llara.encoding.arrays import Array, npy_header, open_array
from llara.errors import StorageError
from llara.files import disk_errors
from llara.index.base import Allowed, Floats, Ids, Positions, TopK, best_first, best_rows, stack

COPIES = "copies.npy"
_BLOCK = 1 << 14  # vectors moved at once


class Copies:
    """Which documents share a vector with an earlier one.

    Args:
        table: int64 [copies, 2], as in the file.
        count: Documents, those without a copy among them.

    Attributes:
        vectors: How many different vectors there are.
    """

    def __init__(self, table: Positions, count: int) -> None:
        self._positions, self._vectors = np.ascontiguousarray(table.T)
        self.count, self.vectors = count, count - len(table)
        self._before = self._positions - np.arange(len(table))  # vectors that come before each copy
        order = np.argsort(self._vectors, kind="stable")
        self._of_vector, self._members = self._vectors[order], self._positions[order]

    @classmethod
    def open(cls, folder: Path, copies: int, count: int) -> "Copies":
        """Reads the table of a folder with so many copies among `count` documents; StorageError where it is damaged."""
        if not copies:
            return cls(np.empty((0, 2), np.int64), count)
        found = cls(np.array(open_array(folder / COPIES, "int64", (copies, 2))), count)
        # Each copy comes after the document that has its vector first, and both are there.
        rising = (np.diff(found._positions, prepend=0) > 0).all() and found._positions[-1] < count
        if not rising or (found._vectors < 0).any() or (found._vectors >= found._before).any():
            path = folder / COPIES
            raise StorageError(path, "is damaged: it names documents that cannot be copies; rebuild the index")
        return found

    def vectors_of(self, positions: Positions) -> Positions:
        """Returns the numbers of the vectors of documents, int64 to int64 of the same shape."""
        if not len(self._positions):
            return positions
        before = np.searchsorted(self._positions, positions)
        at = np.minimum(before, len(self._positions) - 1)
        return np.where(self._positions[at] == positions, self._vectors[at], positions - before)

    def firsts(self, vectors: Positions) -> Positions:
        """Returns the first document that has each vector, int64 to int64 of the same shape; -1 stays -1."""
        return vectors + np.searchsorted(self._before, vectors, side="right")

    def allowed(self, allowed: Allowed) -> Allowed:
        """Returns the vectors of which some document is allowed."""
        if not len(self._positions):
            return allowed
        documents = allowed.mask(0, self.count)
        vectors = np.delete(documents, self._positions)
        vectors[self._vectors[documents[self._positions]]] = True
        return Allowed.of(vectors)

    def documents(self, scores: Floats, vectors: Positions, ids: Ids, top_k: int, allowed: Allowed | None) -> TopK:
        """Returns the best documents from the scores of vectors, both [queries, candidates] with `candidates` >= top_k.

        A candidate with a score of -inf is none.
        """
        firsts = self.firsts(vectors)
        if not len(self._positions):
            return best_rows(scores, firsts, ids, top_k)
        starts = np.searchsorted(self._of_vector, vectors)
        copies = np.searchsorted(self._of_vector, vectors, side="right") - starts
        several = copies.any(axis=1)
        top = best_rows(scores, firsts, ids, top_k)
        rows = []
        for row in np.flatnonzero(several):
            of_copies = np.repeat(scores[row], copies[row])
            within = np.arange(len(of_copies)) - np.repeat(np.cumsum(copies[row]) - copies[row], copies[row])
            members = self._members[np.repeat(starts[row], copies[row]) + within]
            found, positions = np.r_[scores[row], of_copies], np.r_[firsts[row], members]
            kept = found > -np.inf
            if allowed is not None:
                kept[kept] = allowed.holds(positions[kept])
            rows.append(best_first(found[kept], positions[kept], ids, top_k))
        top.scores[several], top.positions[several] = stack(rows, top.scores.shape[1])
        return top


class Digests:
    """Finds rows that are equal, byte by byte, as they pass by: 16 bytes are kept of each."""

    def __init__(self) -> None:
        self._found: list[bytes] = []

    def look(self, rows: Floats) -> None:
        """Takes more rows, [n, dim]."""
        rows = np.ascontiguousarray(rows)
        self._found.append(b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in rows))

    def table(self) -> Positions:
        """Returns the copies among all rows, as `Copies` takes them."""
        halves: NDArray[np.uint64] = np.frombuffer(b"".join(self._found), np.uint64).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: rows of one digest stay in their order
        again = np.zeros(len(order), np.bool_)
        again[1:] = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
        leaders = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
        pairs = np.stack([order[again], order[leaders[again]]], axis=1)
        pairs = pairs[np.argsort(pairs[:, 0])]
        pairs[:, 1] -= np.searchsorted(pairs[:, 0], pairs[:, 1])  # from a document to the number of its vector
        return pairs


def without(path: Path, vectors: Array, copies: Positions) -> Array:
    """Moves the rows that are no copies to the beginning of an array file; returns them, mapped.

    `vectors` is the mapped file and `copies` the rising positions of those to pass over. The rest of the file is left
    as it was. Written and not assigned to the mapping, where a full disk would end the process.
    """
    if not len(copies):
        return vectors
    kept = np.ones(len(vectors), np.bool_)
    kept[copies] = False
    with disk_errors(path), path.open("r+b") as file:
        file.seek(len(npy_header(vectors.dtype, vectors.shape)))
        for start in range(0, len(vectors), _BLOCK):
            file.write(vectors[start : start + _BLOCK][kept[start : start + _BLOCK]].data)
    return vectors[: int(kept.sum())]
