"""Sides of a comparison that take turns, each in a process of its own."""

import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[int], float]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Side:
    """One side in a process of its own, as a run has it: what one allocates and frees is no help to another.

    Args:
        make: Called there with `arguments`; returns what takes the step of a number and gives its loss.
        arguments: Anything that can be sent to a process.
        threads: Of torch; None leaves them as they are.
    """

    def __init__(self, make: Callable[..., Step], *arguments: Any, threads: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._ask, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, threads), daemon=True)
        self._process.start()
        self._ask.recv()  # the model is loaded

    def step(self, number: int, clock: str = "wall") -> tuple[float, float]:
        """Takes a step; returns its seconds and its loss."""
        self._ask.send((number, clock))
        seconds, loss = self._ask.recv()
        return seconds, loss

    def close(self) -> float:
        """Ends the process; returns MiB of resident memory that steps added to the loaded model at their peak."""
        self._ask.send(None)
        used = float(self._ask.recv())
        self._process.join()
        return used


def _serve(pipe: Any, make: Callable[..., Step], arguments: tuple[Any, ...], threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    step = make(*arguments)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of loading
    before = resident("VmRSS")
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        number, clock = asked
        gc.collect()
        began = CLOCKS[clock]()
        loss = step(number)
        pipe.send((CLOCKS[clock]() - began, loss))
    pipe.send((resident("VmHWM") - before) / 2**20)


def resident(what: str) -> int:
    """Returns bytes of a line of this process's status, such as VmRSS or VmHWM. Needs Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
