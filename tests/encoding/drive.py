"""Encodes a corpus of slow documents in two worker processes: a driver for tests to end.

    python -m tests.encoding.drive CORPUS OUTPUT

Prints the workers' process ids in one line once the first document is done.
"""

import sys
from pathlib import Path

from llara.cli import main
from llara.encoding import engines
from tests.encoding.fakes import HarmfulProcesses


class Telling(HarmfulProcesses):
    told = False

    def _messages(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
        for number, message in super()._messages():
            yield number, message
            if not self.told and "Progressed" in type(message).__name__:
                self.told = True
                # Of the process itself: while a job runs, what is printed goes to stderr.
                print(*(worker.process.pid for worker in self._workers.values()), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    engines.choose_engine = lambda config: Telling(config, 2, [])  # type: ignore[assignment]
    from llara.encoding import encode

    encode.choose_engine = engines.choose_engine
    corpus, output = map(Path, sys.argv[1:])
    flags = [
        "--corpus",
        str(corpus),
        "--output",
        str(output),
        "--model",
        "mini",
        "--device",
        "cpu",
        "--shard-size",
        "5",
    ]
    sys.exit(main(["encode", *flags]))
