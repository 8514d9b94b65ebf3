"""Which engine a job gets, and the one that needs no other process: the model here, tokenising one shard ahead."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

from llara.config import EncodeConfig
from llara.encoding.encoder import DocumentEncoder, Prepared, open_encoder
from llara.encoding.engine import Advance, Engine, Found, Job
from llara.encoding.pool import Facts
from llara.hardware import keep_freed_memory


class OpenEngine(Engine, Protocol):
    """An engine that owns workers: a context manager, entered before anything that takes long.

    Entering it finds faults that show at once, such as a cluster that does not answer.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def facts(self) -> Facts:
        """Loads the model, and returns what decides the vectors; called once, before `encode`.

        Raises:
            LlaraError: The model cannot be loaded, or workers differ in it.
        """
        ...


def choose_engine(config: EncodeConfig) -> OpenEngine:
    """Returns the engine that a job asks for, not yet entered."""
    if config.engine == "ray":
        from llara.encoding.cluster import Cluster

        return Cluster(config)
    gpus = visible_gpus() if config.may_use_gpus and config.workers != 1 else []
    count = config.workers or max(len(gpus), 1)
    if count == 1:
        return Local(config)
    from llara.encoding.processes import Processes

    return Processes(config, count, gpus)


def visible_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] if named else [str(number) for number in range(count)]


class Local:
    """Encodes in this process: while the model runs over one shard, a thread tokenises the next."""

    def __init__(self, config: EncodeConfig) -> None:
        self._config = config
        self._encoder: DocumentEncoder | None = None
        self._threads: int | None = None  # as they were, where this changed them

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)

    def facts(self) -> Facts:
        """See `OpenEngine.facts`."""
        if self._config.worker_threads:
            import torch

            self._threads = torch.get_num_threads()
        self._encoder = open_encoder(self._config, self._config.worker_threads)
        return self._encoder.facts

    def encode(self, jobs: Iterator[Job], advance: Advance) -> Iterator[tuple[str, Found]]:
        """See `Engine.encode`."""
        encoder = self._encoder
        assert encoder is not None, "facts come first"
        thread = ThreadPoolExecutor(1, "tokenise")
        try:
            with keep_freed_memory():
                waiting: tuple[str, Future[Prepared]] | None = None
                for job in jobs:
                    following = job.name, thread.submit(encoder.tokenise, job.documents)
                    if waiting is not None:
                        yield waiting[0], encoder.embed(waiting[1].result(), advance)
                    waiting = following
                if waiting is not None:
                    yield waiting[0], encoder.embed(waiting[1].result(), advance)
        finally:
            thread.shutdown(wait=False)
