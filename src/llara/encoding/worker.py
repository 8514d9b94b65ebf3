"""A worker process of this machine: takes shards from a pipe, and sends back their numbers.

Its driver owns the other end. Whatever becomes of the driver, SIGKILL included, the pipe then ends, and so does the
worker. Nothing heavy is imported before the process has its cores and its GPU.
"""

import os
import queue
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from llara.config import EncodeConfig
from llara.encoding.engine import Job
from llara.encoding.pool import Done, Failure, Progressed
from llara.errors import LlaraError
from llara.hardware import keep_freed_memory

if TYPE_CHECKING:
    from llara.encoding.encoder import DocumentEncoder, Prepared


class Place(NamedTuple):
    """What of the machine is a worker's own; `cores` empty, or `gpu` None, leaves that to the system."""

    threads: int
    cores: tuple[int, ...] = ()
    gpu: str | None = None
    talks: bool = True


def work(link: Connection, config: EncodeConfig, place: Place) -> None:
    """Runs a worker until its driver closes the pipe or something fails; the target of a spawned process.

    Sends `Facts` once, then `Progressed` after each batch and `Done` after each shard; a `Failure` is the last thing.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver says when to stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    inbox: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(link, inbox), daemon=True).start()
    try:
        _serve(link, inbox, _settled(config, place))
    except LlaraError as error:
        link.send(Failure(error))
    except Exception:
        link.send(Failure(None, traceback.format_exc()))
    finally:
        link.close()
        os._exit(0)  # threads that wait for more would keep it


def _receive(link: Connection, inbox: "queue.SimpleQueue[Job]") -> None:
    try:
        while True:
            inbox.put(link.recv())
    except (EOFError, OSError):
        os._exit(0)


def _settled(config: EncodeConfig, place: Place) -> "DocumentEncoder":
    """Takes the worker's place on the machine, then loads the model."""
    if place.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, place.cores)
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    from llara.progress import set_quiet

    set_quiet(not place.talks)
    from llara.encoding import encoder

    return encoder.open_encoder(config, place.threads)


def _serve(link: Connection, inbox: "queue.SimpleQueue[Job]", encoder: "DocumentEncoder") -> None:
    from llara.encoding.encoder import one_ahead

    def take() -> "tuple[str, Prepared]":
        job = inbox.get()
        return job.name, encoder.tokenise(job.documents)

    link.send(encoder.facts)
    with keep_freed_memory():
        for name, prepared in one_ahead(take):
            link.send(Done(name, encoder.embed(prepared, lambda count: link.send(Progressed(count)))))
