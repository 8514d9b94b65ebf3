"""What a calibration reads off the machine: seconds by name, the most memory held, and where it may write.

Torch is imported where a device of its kind is asked about, and not before: the plan of an index does without it, as
the index itself does, and would else count its memory.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from llara.files import free_bytes
from llara.hardware import memory_bytes

if TYPE_CHECKING:
    import torch

Made = TypeVar("Made")


class Clock:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what the block takes to a part."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def make_twice(make: Callable[[], Made]) -> tuple[Made, float]:
    """Makes something twice; returns the second, and the seconds that the first took more: imports and the like.

    The job has to wait for these as well, but makes its own thing, which is measured by itself.
    """
    began = time.perf_counter()
    make()
    between = time.perf_counter()
    made = make()
    return made, max(2 * between - began - time.perf_counter(), 0.0)


def extend(small: int, low: float, whole: int, high: float, count: float) -> float:
    """Returns the value at `count` on the line through those measured at `small` and `whole`, at least the latter.

    What a job does once, such as waiting for the disk to have a file, is so not counted for every document.
    """
    slope = max((high - low) / (whole - small), 0.0) if whole > small else high / whole
    return max(high + slope * (count - whole), high)


def forget_peak(device: "torch.device | None" = None) -> None:
    """Starts the measurement of `peak_memory` anew, where the system can: an earlier job of this process is no part."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]  # before it, there is nothing to reset
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux alone has it, and not in every container; then the peak is that of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: "torch.device | None" = None) -> int:
    """Returns the most bytes held since `forget_peak`: by tensors of a GPU, or else by the process."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory(device: "torch.device | None" = None) -> int:
    """Returns the bytes held now, as `peak_memory` counts them; the most so far where the system does not tell."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return peak_memory(device)


def device_memory(device: "torch.device | None" = None) -> int | None:
    """Returns how much there is to hold; None where nobody knows."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """Gives a folder for a calibration, removed afterwards: beside `output`, whose disk is the one to measure.

    Where nothing may be written there, it is the system's folder for temporary files.
    """
    beside = existing(output)
    try:
        folder = TemporaryDirectory(dir=beside, prefix=".tmp-plan-")
    except OSError:
        folder = TemporaryDirectory(prefix="llara-plan-")
    with folder as name:
        yield Path(name)


def existing(output: Path) -> Path:
    """Returns the folder, there already, in which an output would be made."""
    return next(folder for folder in output.absolute().parents if folder.is_dir())


def free_disk(output: Path) -> int:
    """Returns the free bytes of the disk that an output would lie on."""
    return free_bytes(existing(output))


def folder_bytes(folder: Path) -> int:
    """Returns the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def device_name(device: "torch.device", dtype: "torch.dtype") -> str:
    """Returns what a device is called, with the number of threads where it is the CPU, and in what it computes."""
    import torch

    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {kind}"
    return f"CPU, {torch.get_num_threads()} threads, {kind}" if device.type == "cpu" else f"{device.type}, {kind}"
