"""What every pool of workers does, be they processes or actors of a cluster: hand out, collect, replace the dead."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

from llara.encoding.desk import TRIES, Desk
from llara.encoding.engine import Advance, Found, Job
from llara.errors import LlaraError, ModelError, WorkerError
from llara.progress import note


class Facts(NamedTuple):
    """A worker has its model: the JSON values that decide the vectors, and the size of a vector."""

    identity: dict[str, Any]
    dim: int


class Progressed(NamedTuple):
    """So many documents more are done."""

    documents: int


class Done(NamedTuple):
    """A shard's numbers."""

    name: str
    found: Found


class Failure(NamedTuple):
    """What a worker could not do: a mistake of the user's, or a fault of ours as the text of its traceback."""

    error: LlaraError | None
    trace: str = ""

    def throw(self) -> None:
        """Raises the error as it was, or a RuntimeError with the worker's traceback."""
        if self.error is not None:
            raise self.error
        raise RuntimeError(f"a worker failed:\n{self.trace}")


class Gone(NamedTuple):
    """A worker is no more; `how` goes on from "a worker ..."."""

    how: str


Message = Facts | Progressed | Done | Failure | Gone


class Pool(ABC):
    """Workers, each with the model loaded once. One that is lost is replaced, and its shards are taken over.

    Workers are named by numbers that are never used twice.
    """

    def __init__(self) -> None:
        self._ready: list[int] = []
        self._counted: Counter[int] = Counter()  # documents of the shard at work that were counted as done
        self._stillborn = 0  # workers in a row that were lost before they had loaded the model
        self._known: Facts | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def facts(self) -> Facts:
        """See `OpenEngine.facts`: the first worker's, with which those of the others are compared as they come."""
        self._start()
        while self._known is None:
            for number, message in self._messages():
                self._take(number, message)
        return self._known

    def encode(self, jobs: Iterator[Job], advance: Advance) -> Iterator[tuple[str, Found]]:
        """See `Engine.encode`."""
        desk = Desk(jobs)
        self._hand_out(desk)
        while not desk.finished:
            for number, message in self._messages():
                if isinstance(message, Done):
                    advance(len(desk.done(number, message.name).documents) - self._counted.pop(number, 0))
                    yield message.name, message.found
                elif isinstance(message, Progressed):
                    self._counted[number] += message.documents
                    advance(message.documents)
                elif isinstance(message, Gone):
                    advance(-self._counted.pop(number, 0))
                    self._bury(number, message.how, desk.lost(number, message.how))
                else:
                    self._take(number, message)
            self._hand_out(desk)

    @abstractmethod
    def _start(self) -> None:
        """Starts all workers."""

    @abstractmethod
    def _messages(self) -> Iterator[tuple[int, Message]]:
        """Waits until a worker has something to say, and yields messages with the numbers of those who sent them."""

    @abstractmethod
    def _send(self, number: int, job: Job) -> None:
        """Gives a worker a shard; one that is gone is found so by `_messages`."""

    @abstractmethod
    def _replace(self, number: int) -> None:
        """Clears up behind a worker that is gone, and starts another in its place."""

    @abstractmethod
    def _stop(self) -> None:
        """Ends all workers, whatever they are doing."""

    def _take(self, number: int, message: Message) -> None:
        if isinstance(message, Failure):
            message.throw()
        elif isinstance(message, Gone):
            self._bury(number, message.how, [])
        elif isinstance(message, Facts):
            self._stillborn = 0
            self._ready.append(number)
            self._known = same_facts(self._known, message)

    def _bury(self, number: int, how: str, jobs: list[Job]) -> None:
        if number in self._ready:
            self._ready.remove(number)
        else:
            self._stillborn += 1
        if self._stillborn == TRIES:
            told = f"{TRIES} workers in a row were lost while loading the model, the last of which {how}"
            raise WorkerError(f"{told}; take fewer --workers, or look at the memory that is free")
        again = f"; {' and '.join(job.name for job in jobs)} will be encoded again" if jobs else ""
        note(f"a worker {how}, and is replaced{again}")
        self._replace(number)

    def _hand_out(self, desk: Desk) -> None:
        for number, job in desk.hand_out(self._ready):
            # What a document is stored with beside its text is no business of a worker's.
            bare = [document._replace(metadata={}) for document in job.documents]
            self._send(number, Job(job.name, bare))


def same_facts(known: Facts | None, found: Facts) -> Facts:
    """Returns what a worker says of its model.

    Raises:
        ModelError: It is not what another said, so their vectors would not belong together.
    """
    if known is None or known == found:
        return found
    names = sorted(known.identity.keys() | found.identity.keys())
    pairs = {name: (known.identity.get(name), found.identity.get(name)) for name in names}
    told = ", ".join(f"{name} ({one} and {other})" for name, (one, other) in pairs.items() if one != other)
    advice = "give all of them the same model, and an explicit --dtype"
    raise ModelError(f"workers have loaded models that give other vectors: they differ in {told}; {advice}")
