"""Encodes in several processes of this machine: one per GPU, or one per group of cores."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing import connection

from llara.config import EncodeConfig
from llara.encoding.engine import Job
from llara.encoding.pool import Gone, Message, Pool
from llara.encoding.worker import Place, work
from llara.hardware import usable_cores

Target = Callable[[connection.Connection, EncodeConfig, Place], None]


class _Worker:
    """A process, and the pipe to it."""

    def __init__(self, target: Target, config: EncodeConfig, place: Place) -> None:
        self.place = place
        context = multiprocessing.get_context("spawn")  # a fork would share the driver's threads, locks and CUDA
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, config, place), name="llara encode", daemon=True)
        # A Ctrl-C meanwhile would end the child before it has said that such are none of its business.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()  # so that the pipe ends with the child

    def hear(self) -> Message:
        """Returns what the worker has sent, or how it ended."""
        try:
            message: Message = self.link.recv()
        except (EOFError, OSError):
            return Gone(self._fate())
        return message

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        self.link.close()
        self.process.kill()
        self.process.join()
        self.process.close()

    def _fate(self) -> str:
        self.process.join(10)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


class Processes(Pool):
    """Worker processes of this machine."""

    target = staticmethod(work)

    def __init__(self, config: EncodeConfig, count: int, gpus: list[str]) -> None:
        super().__init__()
        self._config = config
        self._places = places(count, gpus, config.worker_threads)
        self._workers: dict[int, _Worker] = {}
        self._started = 0

    def _start(self) -> None:
        for place in self._places:
            self._begin(place)

    def _begin(self, place: Place) -> None:
        self._workers[self._started] = _Worker(self.target, self._config, place)
        self._started += 1

    def _messages(self) -> Iterator[tuple[int, Message]]:
        links = {worker.link: number for number, worker in self._workers.items()}
        for link in connection.wait(list(links)):
            assert isinstance(link, connection.Connection)
            yield links[link], self._workers[links[link]].hear()

    def _send(self, number: int, job: Job) -> None:
        with contextlib.suppress(OSError):
            self._workers[number].link.send(job)

    def _replace(self, number: int) -> None:
        worker = self._workers.pop(number)
        worker.stop()
        self._begin(worker.place)

    def _stop(self) -> None:
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()


def places(count: int, gpus: list[str], threads: int | None) -> list[Place]:
    """Shares out this machine: each worker gets a group of cores of its own, and a GPU where there are any.

    Args:
        count: Workers.
        gpus: As CUDA_VISIBLE_DEVICES names them; with more workers than GPUs they take turns.
        threads: Threads per worker; None gives each as many as its group has cores, one at least.
    """
    cores = usable_cores()
    each = threads or max(len(cores) // count, 1)
    pinned = each * count <= len(cores)
    return [
        Place(
            threads=each,
            cores=tuple(cores[number * each : (number + 1) * each]) if pinned else (),
            gpu=gpus[number % len(gpus)] if gpus else None,
            talks=number == 0,
        )
        for number in range(count)
    ]
