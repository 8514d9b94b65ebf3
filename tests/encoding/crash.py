"""Runs the writer in children that die by SIGKILL at a chosen event, and prints what each had encoded.

    python -m tests.encoding.crash CORPUS FOLDER EVENT...

An event is one step that touches the disk (reserve, sync, rename) or one call of the encoder, before or after it.
Every child works in a folder of its own, FOLDER/EVENT; one line of JSON per child tells how it ended.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.encoding.helpers import SparseEncoder, run_sparse


class Countdown:
    """Kills the process at the n-th event."""

    def __init__(self, events: int) -> None:
        self.left = events
        self.seen = 0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return watched

    def tick(self) -> None:
        self.left -= 1
        self.seen += 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def child(corpus: Path, output: Path, event: int) -> int:
    """Returns the number of events, where the process lives to the end."""
    countdown = Countdown(event)
    for name in ("posix_fallocate", "fsync", "replace", "unlink"):
        setattr(os, name, countdown.watch(getattr(os, name)))
    run_sparse(corpus, output, encode=countdown.watch(SparseEncoder()))
    return countdown.seen


def main() -> None:
    corpus, folder, events = Path(sys.argv[1]), Path(sys.argv[2]), [int(event) for event in sys.argv[3:]]
    for event in events:
        process = os.fork()
        if process == 0:
            print(json.dumps({"events": child(corpus, folder / str(event), event)}), flush=True)
            os._exit(0)
        status = os.waitpid(process, 0)[1]
        finished = sorted(path.stem for path in (folder / str(event)).glob("shard-*.json"))
        print(json.dumps({"event": event, "status": status, "finished": finished}), flush=True)


if __name__ == "__main__":
    main()
