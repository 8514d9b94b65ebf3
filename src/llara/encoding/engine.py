"""The seam between the writer of a vectors folder and whoever encodes: shards go in, numbers come out.

The writer reads the corpus, finds repeated ids, and publishes; it alone knows the folder. An engine is handed the
documents of shards and gives back their vectors, from this process (`engines.py`), from processes on this machine
(`processes.py`) or from a Ray cluster (`cluster.py`). So a worker needs no file of the corpus or of the folder, and
what is durable is written in one place. A shard's numbers depend on its documents alone: neither the engine, nor the
number of workers, nor the order in which shards come back changes a byte.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from llara.encoding.arrays import Array
from llara.errors import LlaraError, WorkerError
from llara.records import Document
from llara.terms import Terms

Found = Array | tuple[Array, Terms]
Encode = Callable[[list[Document]], Found]
Advance = Callable[[int], object]

TRIES = 3  # workers that one shard may cost before the run ends
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


class Facts(NamedTuple):
    """What a worker says of its model: the JSON values that decide the vectors, and the size of a vector."""

    identity: dict[str, Any]
    dim: int


class Failure(NamedTuple):
    """What a worker could not do: a mistake of the user's, or a fault of ours as the text of its traceback."""

    error: LlaraError | None
    trace: str = ""

    def throw(self) -> None:
        """Raises the error as it was, or a RuntimeError with the worker's traceback."""
        if self.error is not None:
            raise self.error
        raise RuntimeError(f"a worker failed:\n{self.trace}")


class Desk:
    """Which worker has which shards, and which have to be done again.

    Workers are named by numbers that are never used twice. Where a worker is lost, nobody knows which of its shards was
    the reason: each is done again, alone on a worker, so that one that is lost thrice was alone at least twice.
    """

    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._exhausted = False
        self._held: dict[int, list[Job]] = {}
        self._again: deque[Job] = deque()
        self._lost: Counter[str] = Counter()

    @property
    def finished(self) -> bool:
        """Whether every shard has come back."""
        return self._exhausted and not self._again and not any(self._held.values())

    def holds(self, worker: int) -> int:
        """Returns how many shards a worker has."""
        return len(self._held.get(worker, ()))

    def hand_out(self, workers: list[int]) -> Iterator[tuple[int, Job]]:
        """Yields who gets which shard next: a first one for each worker before anyone gets a second."""
        for depth in range(AHEAD):
            for worker in workers:
                if self.holds(worker) == depth and (job := self._next_for(worker)):
                    self._held.setdefault(worker, []).append(job)
                    yield worker, job

    def done(self, worker: int, name: str) -> Job:
        """Takes note that a worker has given back a shard, and returns it."""
        held = self._held[worker]
        job = next(job for job in held if job.name == name)
        held.remove(job)
        return job

    def lost(self, worker: int, how: str) -> list[Job]:
        """Takes back the shards of a worker that is no more; `how` says what became of it.

        Raises:
            WorkerError: One of them was lost too often.
        """
        jobs = self._held.pop(worker, [])
        for job in jobs:
            self._lost[job.name] += 1
            if self._lost[job.name] == TRIES:
                raise WorkerError(_too_often(job, how))
        self._again.extend(jobs)
        return jobs

    def _next_for(self, worker: int) -> Job | None:
        if self._again:
            return None if self.holds(worker) else self._again.popleft()
        if any(job.name in self._lost for job in self._held.get(worker, ())):
            return None
        job = None if self._exhausted else next(self._jobs, None)
        self._exhausted = job is None
        return job


def _too_often(job: Job, how: str) -> str:
    ids = [document.id for document in job.documents]
    named = ", ".join(ids) if len(ids) <= 5 else f"{ids[0]}, {ids[1]} and so on to {ids[-1]}"
    return (
        f"{job.name} was lost with {TRIES} workers, the last of which {how}; its {len(ids):,} documents are {named}. "
        "Nothing of it was kept, and finished shards stay. Where memory ran out, lower --token-budget or --workers; "
        "else look at these documents, then run the same command again"
    )
