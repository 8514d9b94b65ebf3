"""Runs the writer in children that die by SIGKILL at a chosen event, and prints what each had encoded.

    python -m tests.encoding.crash CORPUS FOLDER EVENT...

An event is one step that touches the disk (reserve, sync, rename, remove) or one call of the encoder, before or after
it. Every child works in a folder of its own, FOLDER/EVENT; one line of JSON per child tells how it ended.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.children import Ended, run
from tests.encoding.helpers import SparseEncoder, run_sparse, tree

STEPS = ("posix_fallocate", "fsync", "replace", "unlink")
ENCODE = "encode"


class Countdown:
    """Kills the process at the n-th event. `names` are the events so far, such as `before fsync`."""

    def __init__(self, events: int) -> None:
        self.left = events
        self.names: list[str] = []

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.tick(f"before {name}")
            result = function(*args, **kwargs)
            self.tick(f"after {name}")
            return result

        return watched

    def tick(self, name: str) -> None:
        self.names.append(name)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Finished:
    """The shards that a stopped run left finished, and how their files stood."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.shards = sorted(path.stem for path in output.glob("shard-*.json"))
        self._stood = self._stand()

    def fault(self, reused: int, undisturbed: dict[str, str]) -> str:
        """Says what is wrong after a run that went on and reported `reused` shards; empty where nothing is."""
        if reused != len(self.shards):
            return f"{len(self.shards)} shards were finished, {reused} were found so"
        if self._stand() != self._stood:
            return "a finished shard was made again"
        found = tree(self.output)
        names = sorted(name for name in found.keys() | undisturbed.keys() if found.get(name) != undisturbed.get(name))
        return f"other bytes than an undisturbed run's: {', '.join(names)}" if names else ""

    def _stand(self) -> dict[str, tuple[int, int, int]]:
        found = {}
        for shard in self.shards:
            for path in self.output.glob(f"{shard}.*"):
                state = path.stat()
                found[path.name] = (state.st_ino, state.st_mtime_ns, state.st_size)
        return found


def child(corpus: Path, output: Path, event: int, shard_size: int = 10) -> list[str]:
    """Returns the events, where the process lives to the end."""
    countdown = Countdown(event)
    for name in STEPS:
        setattr(os, name, countdown.watch(getattr(os, name), name))
    run_sparse(corpus, output, shard_size, encode=countdown.watch(SparseEncoder(), ENCODE))
    return countdown.names


def crash(corpus: Path, output: Path, event: int, shard_size: int = 10) -> Ended:
    """Runs the writer in a child that dies at an event; prints the events where it lives to the end."""
    return run(lambda: print(json.dumps(child(corpus, output, event, shard_size))))


def main() -> None:
    corpus, folder, events = Path(sys.argv[1]), Path(sys.argv[2]), [int(event) for event in sys.argv[3:]]
    for event in events:
        ended = crash(corpus, folder / str(event), event)
        seen = json.loads(ended.out) if ended.status == 0 else []
        print(json.dumps({"event": event, "status": ended.status, "events": len(seen)}), ended.err, flush=True)


if __name__ == "__main__":
    main()
