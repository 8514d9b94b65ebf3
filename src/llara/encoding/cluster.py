"""Encodes on an existing Ray cluster: one actor per GPU or group of cores, which gets shards and gives back numbers.

Actors, and not `ray.data`: a Dataset reads its rows on the workers, from files that all of them see, or has all of them
before it starts, while here the driver reads them as it goes, for only it knows which ids are repeated and what is
finished. And Ray Data starts a lost task again without end, so that a document that kills its worker is never named.

The driver's machine holds the folder and publishes; a node needs llara with the extra `ray`, and the model under the
name that the driver was given.
"""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from llara import __version__
from llara.config import EncodeConfig
from llara.encoding.engine import AHEAD, Found, Job
from llara.encoding.pool import Done, Facts, Failure, Gone, Message, Pool
from llara.errors import LlaraError, MissingExtra, WorkerError
from llara.hardware import keep_freed_memory
from llara.progress import note, set_quiet
from llara.records import Document

if TYPE_CHECKING:
    from llara.encoding.encoder import DocumentEncoder

ANSWERS_WITHIN = 5.0  # seconds for a connection to the address
PROBED_WITHIN = 60.0  # seconds for a child process that imports Ray and joins the cluster
SILENT_FOR = 30.0  # seconds without news, after which a note says what is being waited for

# Ray keeps trying for minutes, and then may end the process: so a child tries first.
PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); print('joined')"


class _Opened(NamedTuple):
    """What an actor says when its model is loaded."""

    facts: Facts
    version: str
    node: str


class Actor:
    """What runs on a node. It never raises: what went wrong is a value, which Ray hands on as it is.

    Ray calls it in `AHEAD` threads: one shard is tokenised while another is in the model.
    """

    def __init__(self, config: EncodeConfig, threads: int) -> None:
        self._config, self._threads = config, threads
        self._tokenising, self._embedding = threading.Lock(), threading.Lock()
        self._encoder: DocumentEncoder | None = None
        self._kept = contextlib.ExitStack()  # as long as the process lives

    def open(self) -> _Opened | Failure:
        """Loads the model."""
        try:
            set_quiet(True)  # the driver does not show what nodes print
            if self._config.offline:  # as the command line does it, before anything reads them
                os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
            self._kept.enter_context(keep_freed_memory())
            self._encoder = self._open()
            return _Opened(self._encoder.facts, __version__, platform.node())
        except Exception as error:
            return _failure(error)

    def _open(self) -> "DocumentEncoder":
        from llara.encoding.encoder import open_encoder

        return open_encoder(self._config, self._threads)

    def encode(self, documents: list[Document]) -> Found | Failure:
        """Returns the numbers of one shard."""
        assert self._encoder is not None
        try:
            with self._tokenising:
                tokens = self._encoder.tokenise(documents)
            with self._embedding:
                return self._encoder.embed(tokens)
        except Exception as error:
            return _failure(error)


def _failure(error: Exception) -> Failure:
    return Failure(error) if isinstance(error, LlaraError) else Failure(None, traceback.format_exc())


class Cluster(Pool):
    """The actors of one run. Entering it joins the cluster, leaving it ends the actors."""

    actor: ClassVar[type[Actor]] = Actor

    def __init__(self, config: EncodeConfig) -> None:
        super().__init__()
        self._config = config
        self._ray = _import_ray()
        self._joined = False  # by us, and so to be left by us
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Any, tuple[int, str | None]] = {}  # answers to come: whose, and for which shard
        self._started = 0

    def __enter__(self) -> Self:
        assert self._config.address is not None
        if not self._ray.is_initialized():
            join(self._ray, self._config.address)
            self._joined = True
        return self

    def _start(self) -> None:
        self._needs = _needs(self._ray, self._config)
        count = self._config.workers or _room(self._ray, self._needs)
        if not count:
            advice = "lower --worker-threads or --worker-gpus, or give --workers to wait for nodes that come on demand"
            raise WorkerError(f"{self._config.address}: no node has room for a worker of {self._wanted()}; {advice}")
        note(f"{self._config.address}: {count} workers of {self._wanted()} each")
        for _ in range(count):
            self._begin()

    def _wanted(self) -> str:
        return " and ".join(f"{number:g} {kind}" for kind, number in self._needs.items() if number)

    def _begin(self) -> None:
        options = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "max_concurrency": AHEAD}
        # No restarts by Ray: which shards a lost worker had, and how often they were lost, is told by the desk.
        options |= {"max_restarts": 0, "max_task_retries": 0}
        # Who is given no GPU takes none, also where a node shows all of its own.
        config = self._config if self._needs["GPU"] else replace(self._config, device="cpu")
        actor = self._ray.remote(self.actor).options(**options).remote(config, int(self._needs["CPU"]))
        self._actors[self._started] = actor
        self._waiting[actor.open.remote()] = (self._started, None)
        self._started += 1

    def _messages(self) -> Iterator[tuple[int, Message]]:
        answers, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=SILENT_FOR)
        if not answers and not self._ready:
            note(f"{self._config.address}: waiting for a worker of {self._wanted()} to start and load the model")
        for answer in answers:
            if answer in self._waiting:  # and not one of an actor that was found dead a moment ago
                number, name = self._waiting.pop(answer)
                yield number, self._open(answer, name)

    def _open(self, answer: Any, name: str | None) -> Message:
        errors = self._ray.exceptions
        try:
            found = self._ray.get(answer)
        except (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return Gone(f"was lost ({_first_line(error)})")
        except errors.RayTaskError as error:
            return Failure(None, str(error))
        if isinstance(found, Failure):
            return found
        if isinstance(found, _Opened):
            _refuse_other_version(found)
            return found.facts
        assert name is not None
        return Done(name, found)

    def _send(self, number: int, job: Job) -> None:
        self._waiting[self._actors[number].encode.remote(job.documents)] = (number, job.name)

    def _replace(self, number: int) -> None:
        self._drop(number)
        self._begin()

    def _drop(self, number: int) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors.pop(number))
        self._waiting = {answer: whose for answer, whose in self._waiting.items() if whose[0] != number}

    def _stop(self) -> None:
        for number in list(self._actors):
            self._drop(number)
        if self._joined:
            self._ray.shutdown()


def _import_ray() -> ModuleType:
    # Ray warns of what it will do with GPUs in future; this is that future.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MissingExtra("--engine ray", "ray") from error
    found: ModuleType = ray
    return found


def join(ray: ModuleType, address: str) -> None:
    """Joins a cluster.

    Raises:
        WorkerError: Nothing answers at the address, what answers is no Ray, or another version of it.
    """
    _knock(address)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, address], capture_output=True, text=True, timeout=PROBED_WITHIN, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _unreachable(address, f"no Ray cluster has answered within {PROBED_WITHIN:g} s") from error
    if "joined" not in probe.stdout:
        said = [line for line in probe.stderr.splitlines() if line.strip()]
        raise _unreachable(address, said[-1] if said else f"joining ended with exit code {probe.returncode}")
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")


def _knock(address: str) -> None:
    """Finds out quickly where nothing listens; `auto` is an address that only Ray knows."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise _unreachable(address, "is neither HOST:PORT nor auto")
    try:
        socket.create_connection((host, int(port)), ANSWERS_WITHIN).close()
    except OSError as error:
        raise _unreachable(address, f"nothing answers there ({error.strerror or error})") from error


def _unreachable(address: str, reason: str) -> WorkerError:
    advice = "give HOST:6379 of the head (or the port that ray start --head was given), on a machine that is a node"
    return WorkerError(f"--address {address}: {reason}; {advice}")


def _needs(ray: ModuleType, config: EncodeConfig) -> dict[str, float]:
    """Returns what a worker takes of a node."""
    gpus = config.worker_gpus
    if gpus is None:
        gpus = 1.0 if config.may_use_gpus and ray.cluster_resources().get("GPU") else 0.0
    return {"CPU": float(config.worker_threads or 1), "GPU": gpus}


def _room(ray: ModuleType, needs: dict[str, float]) -> int:
    """Returns how many workers fit the nodes as they are."""
    kinds = {kind: number for kind, number in needs.items() if number}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(kind, 0) // number) for kind, number in kinds.items()) for node in nodes)


def _refuse_other_version(opened: _Opened) -> None:
    if opened.version != __version__:
        advice = "install the same on all nodes"
        raise WorkerError(f"node {opened.node} has llara {opened.version}, and this machine {__version__}; {advice}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(":.")
