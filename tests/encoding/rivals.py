"""Lets two encoders run into one output folder at the same moment, and tells how each fared.

    python -m tests.encoding.rivals CORPUS FOLDER

Both write into FOLDER/vectors; two lines of JSON tell how each ended.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llara.errors import StorageError
from tests.children import Child, Ended
from tests.encoding.helpers import FakeEncoder, run

PATIENCE = 60.0  # seconds that the winner waits for the other; a busy machine may pause either


class Race(NamedTuple):
    """How two rivals ended, the winner first; `fault` is empty where one won and the other was told who."""

    ended: list[Ended]
    fault: str


def patient(function: Callable[..., Any], refused: Path) -> Callable[..., Any]:
    """Returns an encoder that goes on only when the file `refused` is there: so the winner still writes by then."""

    def wait(*args: Any, **kwargs: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not refused.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        return function(*args, **kwargs)

    return wait


def race(job: Callable[[], int | None], refused: Path, folder: Path | None = None) -> Race:
    """Starts a job twice at the same moment; it exits with 2 where it is refused, and `refused` is made then."""
    reading, writing = os.pipe()

    def rival() -> int:
        os.close(writing)
        os.read(reading, 1)  # returns in both children when the parent closes its end
        code = job() or 0
        if code:
            refused.touch()
        return code

    rivals = [Child(rival, folder) for _ in range(2)]
    os.close(reading)
    os.close(writing)
    pairs = sorted(((each.pid, each.wait()) for each in rivals), key=lambda pair: pair[1].status)
    (winner, won), (_, lost) = pairs
    fault = ""
    if (won.status, lost.status) != (0, 2):
        fault = f"ended with {won.status} and {lost.status}: {won.err} {lost.err}"
    elif f"is being written by process {winner} on {os.uname().nodename}" not in lost.err:
        fault = f"the other was not told who writes: {lost.err}"
    return Race([won, lost], fault)


def main() -> None:
    corpus, output = Path(sys.argv[1]), Path(sys.argv[2]) / "vectors"
    refused = output.with_name("refused")

    def job() -> int:
        encoder = FakeEncoder()
        try:
            run(corpus, output, encode=patient(encoder, refused))
        except StorageError as error:
            print(error, file=sys.stderr)
            return 2
        print(len(encoder.calls))
        return 0

    done = race(job, refused)
    print(json.dumps({"fault": done.fault, "calls": done.ended[0].out.strip()}))


if __name__ == "__main__":
    main()
