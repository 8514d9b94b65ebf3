"""The seam between the writer of a vectors folder and whoever encodes: shards go in, numbers come out.

The writer reads the corpus, finds repeated ids, and publishes; it alone knows the folder. An engine is handed the
documents of shards and gives back their vectors, from this process (`engines.py`), from processes on this machine
(`processes.py`) or from a Ray cluster (`cluster.py`). So a worker needs no file of the corpus or of the folder, and
what is durable is written in one place. A shard's numbers depend on its documents alone: neither the engine, nor the
number of workers, nor the order in which shards come back changes a byte.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from llara.encoding.arrays import Array
from llara.records import Document
from llara.terms import Terms


class Encoded(NamedTuple):
    """What an engine gives for documents: vectors alone are the same as a tuple of nothing else.

    Attributes:
        vectors: Float [rows, dim]; a row is a document, or a passage.
        terms: The sparse vectors of the rows.
        passages: int64 [rows, 3], see `llara.encoding.manifest.PASSAGES`.
    """

    vectors: Array
    terms: Terms | None = None
    passages: Array | None = None


Found = Array | tuple[Array, Terms] | Encoded
Encode = Callable[[list[Document]], Found]
Advance = Callable[[int], None]

AHEAD = 2  # shards that a worker holds: one in the model, one being tokenised


class Job(NamedTuple):
    """One shard to be encoded: its name, and its documents, one or more."""

    name: str
    documents: list[Document]


class Engine(Protocol):
    """Encodes shards."""

    def encode(self, jobs: Iterator[Job], advance: Advance) -> Iterator[tuple[str, Found]]:
        """Yields the name of each shard and its numbers, each shard once, in the order in which they get done.

        A job is taken from `jobs` only when a worker is about to need it, and in the thread that iterates, so what is
        in memory is bounded by `AHEAD` shards per worker.

        Args:
            jobs: The shards.
            advance: Told how many documents more are done; a negative number takes back those of a lost worker.

        Raises:
            LlaraError: What a worker raised, the same as in one process; `WorkerError` for a shard that keeps killing
                its workers.
        """
        ...


class Inline:
    """Encodes one shard after the other by a plain function, which counts the documents itself where anyone does."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    def encode(self, jobs: Iterator[Job], advance: Advance) -> Iterator[tuple[str, Found]]:
        """See `Engine.encode`."""
        for job in jobs:
            yield job.name, self._encode(job.documents)
