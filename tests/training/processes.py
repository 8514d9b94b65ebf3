"""Processes as torchrun has them, forked from one that has the imports done: for scripts, not for pytest itself."""

import faulthandler
import os
import signal
import socket
import traceback
from collections.abc import Callable

PATIENCE = 240  # seconds


def fork_ranks(job: Callable[[int], None], world: int = 2) -> list[int]:
    """Runs `job(rank)` in `world` processes and returns their exit codes, negative ones being signals.

    As with torchrun, the first that fails takes the others with it. One that hangs says where, and fails.
    """
    port = free_port()
    ranks: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _be_rank(rank, world, port)
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            try:
                job(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        ranks[pid] = rank
    codes = [0] * world
    waiting = dict(ranks)
    while waiting:
        pid, status = os.wait()
        codes[waiting.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in waiting:
                os.kill(other, signal.SIGTERM)
    return codes


def _be_rank(rank: int, world: int, port: int) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()}, MASTER_ADDR="127.0.0.1")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
