"""Runs jobs in processes of their own, forked from this one, and tells how each ended.

A fork spares a child the seconds that the imports take. All else is as in a process that a shell has started: it has an
exit code or dies of a signal, its output goes to files, and it may be killed at any moment. Fork from a process without
threads: from a script, not from a test.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

# transformers imports most of itself when a model is loaded.
ENCODE = (
    *("llara.cli.parse", "llara.cli.show", "llara.retriever", "llara.encoding.encode", "safetensors.torch"),
    *("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.tokenization_auto", "transformers.generation"),
)
FAULT = 70  # exit code of a job that raised


class Ended(NamedTuple):
    """How a child ended: its exit code, or the signal that it died of as a negative number; and what it printed."""

    status: int
    out: str
    err: str


class Child:
    """A job that runs in a child, from now on, in `folder`. What it returns is the exit code; None is 0."""

    def __init__(self, job: Callable[[], int | None], folder: Path | None = None) -> None:
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - closed by `wait`
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(job, folder)

    def kill(self) -> None:
        """Sends SIGKILL; a child that has ended already is left as it is."""
        os.kill(self.pid, signal.SIGKILL)  # until `wait`, the number is nobody else's

    def ended(self) -> bool:
        """Tells whether the child has ended, and leaves it to `wait`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> Ended:
        """Waits for the end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Ended(status, *texts)

    def _run(self, job: Callable[[], int | None], folder: Path | None) -> None:
        code = FAULT
        try:
            for descriptor, file in enumerate(self._files, 1):
                os.dup2(file.fileno(), descriptor)
            if folder is not None:
                os.chdir(folder)
            code = job() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # none of the parent's business at exit


def run(job: Callable[[], int | None], folder: Path | None = None) -> Ended:
    """Runs a job in a child to its end."""
    return Child(job, folder).wait()


def command(*words: object) -> Callable[[], int]:
    """Returns the job that is the command line `llara WORDS`."""

    def job() -> int:
        from llara.cli import main

        return main([str(word) for word in words])

    return job


def preload(*more: str) -> None:
    """Imports what `llara encode` needs, and more modules, so that it is done once for all children.

    One thread, since threads do not survive a fork.
    """
    import importlib

    import torch

    torch.set_num_threads(1)
    for module in (*ENCODE, *more):
        importlib.import_module(module)
