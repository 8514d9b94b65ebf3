"""Workers without a model: their vectors tell the text, and some documents do harm to whoever encodes them.

What a document's text starts with says what it does: `KILL` ends the worker by SIGKILL each time, `ONCE path` does so
where no file stands at that path yet, `RAISE` raises an error of the user's, `FAULT` one of ours, `SLOW` takes 0.2 s.
"""

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from llara.config import EncodeConfig
from llara.encoding import encoder
from llara.encoding.cluster import Actor, Cluster
from llara.encoding.pool import Facts
from llara.encoding.processes import Processes
from llara.encoding.worker import Place, work
from llara.errors import DataError
from llara.records import Document
from tests.encoding.helpers import DIM, IDENTITY, vector_of


class Harmful:
    """Has the face of `DocumentEncoder`."""

    facts = Facts(IDENTITY, DIM)

    def __init__(self, config: EncodeConfig, threads: int | None = None) -> None:
        if config.model == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.model == "RAISE":
            raise DataError("model", 7, "is a bad one")

    def tokenise(self, documents: list[Document]) -> list[Document]:
        assert not any(document.metadata for document in documents) or os.environ.get("INLINE"), "sent for nothing"
        return documents

    def embed(self, documents: list[Document], advance: Any = None) -> np.ndarray[Any, Any]:
        for document in documents:
            act(document.text)
            if advance is not None:
                advance(1)
        return np.array([vector_of(document) for document in documents], np.float32)


def act(text: str) -> None:
    """Does what a text says."""
    word, _, rest = text.partition(" ")
    if word == "KILL" or (word == "ONCE" and not Path(rest).exists()):
        if rest:
            Path(rest).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "RAISE":
        raise DataError("corpus", 3, "is a bad one")
    if word == "FAULT":
        raise ZeroDivisionError("ours")
    if word == "SLOW":
        time.sleep(0.2)


def harmful_work(link: Connection, config: EncodeConfig, place: Place) -> None:
    """A worker process with such an encoder."""
    encoder.open_encoder = Harmful  # type: ignore[assignment, misc]
    work(link, config, place)


class HarmfulProcesses(Processes):
    target = staticmethod(harmful_work)


class HarmfulActor(Actor):
    def _open(self) -> Any:
        return Harmful(self._config)


class HarmfulCluster(Cluster):
    actor = HarmfulActor
