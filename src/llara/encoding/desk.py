"""Which worker has which shards, and which have to be done again; it knows no processes and no machines."""

from collections import Counter, deque
from collections.abc import Iterator

from llara.encoding.engine import AHEAD, Job
from llara.errors import WorkerError

TRIES = 3  # workers that one shard may cost before the run ends


class Desk:
    """Hands out shards, and takes note of what comes back.

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
