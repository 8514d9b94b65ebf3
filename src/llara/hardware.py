"""The hardware: what torch finds on this machine, its memory, and what GPUs can do that are not here.

Torch is asked in a child process: a bfloat16 product may kill the process that tries it. Seen with torch 2.13 on a CPU
that advertises AMX: an illegal instruction inside the matrix library. So float32 is the default on a CPU, and bfloat16
is tried in a child before a model runs in it.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llara.errors import ConfigError, nearest

PROBE_SECONDS = 120

# The first line is written before the product that may be the last thing the process does.
PROBE = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
mps = torch.backends.mps.is_available()
print(json.dumps({"gpus": names + (["Apple MPS"] if mps else []), "threads": torch.get_num_threads()}), flush=True)
a, b = torch.ones(300, 256, dtype=torch.bfloat16), torch.ones(768, 256, dtype=torch.bfloat16)
assert torch.nn.functional.linear(a, b)[0, 0].item() == 256
print("ok", flush=True)
"""
WORKS = "works"


def probe_torch() -> tuple[tuple[str, ...], int | None, str]:
    """Asks a child process for GPUs, threads, and whether a bfloat16 product works; (gpus, threads, verdict)."""
    try:
        child = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return (), None, f"no answer within {PROBE_SECONDS} s"
    first, _, rest = child.stdout.partition("\n")
    if not first:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        return (), None, f"torch does not start: {last[0]}"
    found = json.loads(first)
    return tuple(found["gpus"]), found["threads"], _verdict(rest.strip() == "ok", child)


def _verdict(done: bool, child: "subprocess.CompletedProcess[str]") -> str:
    if done:
        return WORKS
    if child.returncode < 0:
        return f"kills the process ({signal.Signals(-child.returncode).name}); use --dtype float32"
    last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
    return f"fails: {last[0]}; use --dtype float32"


def memory_bytes() -> int | None:
    """Returns the memory of this machine, or of the container where that is less; None where neither is known."""
    sizes = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        sizes.append(int(limit.read_text()))
    return min(sizes, default=None)


def cores() -> int:
    """Returns how many processor cores this process may use."""
    return len(usable_cores())


def usable_cores() -> list[int]:
    """Returns the numbers of the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error says that memory has run out, on a GPU or, in torch's own words, on the CPU."""
    if isinstance(error, MemoryError):
        return True
    said = r"not enough memory|can't allocate memory|out of memory"  # torch.OutOfMemoryError is a RuntimeError
    return isinstance(error, RuntimeError) and re.search(said, str(error), re.IGNORECASE) is not None


# Parameters of mallopt(3), and what glibc itself comes to for a process with large blocks: 32 and 64 MiB.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_USUAL = ((_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, 1 << 26))
# Both take an int. The first is the largest power of two in it, the second stands for "never".
_KEPT = ((_MMAP_THRESHOLD, 1 << 30), (_TRIM_THRESHOLD, -1))


@contextmanager
def keep_freed_memory(wanted: bool = True) -> Iterator[bool]:
    """Has the C library keep memory that this process frees, for its next tensors; says whether it can.

    A forward pass on a CPU allocates and frees the same large blocks again and again. Left alone, glibc hands them back
    to the system, which then fills each page with zeros anew: a sixth of the time of a training step
    (benchmarks/results/2026-11-29-adapt-step.md). The peak stays what it is, and at the end all goes back.
    """
    library = ctypes.CDLL(None) if wanted and os.name == "posix" else None
    mallopt, trim = (getattr(library, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield False
        return
    kept = all(mallopt(*each) for each in _KEPT)
    try:
        yield kept
    finally:
        for each in _USUAL:
            mallopt(*each)
        trim(ctypes.c_size_t(0))


class Gpu(NamedTuple):
    """One kind of GPU: the sizes of memory it is sold with in GB, the first the usual one, and its peaks in TFLOP/s.

    `half` is that of 16-bit matrix products with sums in float32, dense: without the factor 2 of structured sparsity.
    `bf16` tells whether they may be bfloat16, which training takes; else they are float16. `single` is that of float32.
    """

    memory: tuple[int, ...]
    half: float
    single: float
    bf16: bool = True


# From NVIDIA's data sheets and architecture papers (SXM where there are several forms: H100 as PCIe card has 756), the
# A10G from the one that AWS publishes for G5, the MI300X from AMD's. Marketing counts sparsity in, so half of theirs.
GPUS = {
    "T4": Gpu((16,), 65.0, 8.1, bf16=False),
    "V100": Gpu((32, 16), 125.0, 15.7, bf16=False),
    "A10": Gpu((24,), 125.0, 31.2),
    "A10G": Gpu((24,), 70.0, 31.2),
    "A30": Gpu((24,), 165.0, 10.3),
    "A40": Gpu((48,), 149.7, 37.4),
    "A100": Gpu((80, 40), 312.0, 19.5),
    "L4": Gpu((24,), 121.0, 30.3),
    "L40S": Gpu((48,), 362.0, 91.6),
    "H100": Gpu((80, 94), 989.0, 66.9),
    "H200": Gpu((141,), 989.0, 66.9),
    "B200": Gpu((180, 192), 2250.0, 75.0),
    "MI300X": Gpu((192,), 1307.0, 163.4),
    "RTX3090": Gpu((24,), 71.0, 35.6),
    "RTX4090": Gpu((24,), 165.2, 82.6),
    "RTXA6000": Gpu((48,), 154.8, 38.7),
}


class Fleet(NamedTuple):
    """A number of GPUs of one kind, each with so much memory."""

    number: int
    name: str
    gpu: Gpu
    memory_gb: int

    def __str__(self) -> str:
        return f"{self.number} x {self.name}-{self.memory_gb}GB"

    @property
    def memory(self) -> int:
        """Memory of one GPU in bytes, as its seller counts: 80 GB are 80e9."""
        return round(self.memory_gb * 10**9)


_FLEET = re.compile(r"(?:(?P<number>\d+)\s*[x*]\s*)?(?P<name>[a-z][\w ]*?)(?:-(?P<memory>\d+)\s*(?:gb?|gib)?)?", re.I)


def parse_fleet(text: str) -> Fleet:
    """Returns the GPUs that `8xH100-80GB`, `4 x A100` or `L4` names.

    Raises:
        ConfigError: Not of that form, a GPU that is not in `GPUS`, or a size that it is not sold with.
    """
    found = _FLEET.fullmatch(text.strip())
    if found is None or found["number"] in {"0"}:
        raise ConfigError(f"--fleet: {text!r} is not of the form NUMBERxNAME or NUMBERxNAME-MEMORY, as 8xH100-80GB")
    name = re.sub(r"[\s_]", "", found["name"]).upper()
    if name not in GPUS:
        raise ConfigError(f"--fleet: unknown GPU {found['name']!r}{nearest(name, GPUS)}; known are {', '.join(GPUS)}")
    gpu = GPUS[name]
    memory = int(found["memory"] or gpu.memory[0])
    if memory not in gpu.memory:
        sizes = " or ".join(f"{size} GB" for size in sorted(gpu.memory))
        raise ConfigError(f"--fleet: {name} comes with {sizes}, not with {memory} GB")
    return Fleet(int(found["number"] or 1), name, gpu, memory)
