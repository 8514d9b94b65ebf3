"""What a bug report should say: versions, hardware, extras, and what this machine cannot promise.

Nothing heavy is imported here; what needs torch runs in a child process, see hardware.py.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llara.config import JobConfig
from llara.errors import StorageError
from llara.files import durability_notes, write_atomic
from llara.hardware import PROBE_SECONDS, cores, memory_bytes, probe_torch

PACKAGES = (
    "llara", "torch", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "huggingface_hub", "numpy",
    "scipy", "faiss-cpu", "bm25s", "PyStemmer", "ir-measures", "rich", "cyclopts",
)  # fmt: skip
VARIABLES = (
    "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NO_COLOR", "LANG",
)  # fmt: skip
PRODUCTS = "from llara.onednn import is_faster_here; print('oneDNN' if is_faster_here() else 'torch')"


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found. `packages` maps a name to its version, or None where it is missing."""

    python: str
    platform: str
    packages: dict[str, str | None]
    cpu: str
    cores: int
    memory_bytes: int | None
    free_disk_bytes: int
    gpus: tuple[str, ...]
    torch_threads: int | None
    bfloat16_on_cpu: str
    """`works`, or what happened instead."""
    products_on_cpu: str
    """Whose float32 linear maps a CPU takes, `torch` or `oneDNN`; `unknown` where that could not be asked."""
    extras: dict[str, str]
    """Extra -> `installed`, or the command that installs it."""
    durability: tuple[str, ...]
    """What the file system here cannot promise; empty is good."""
    environment: dict[str, str]

    def to_text(self) -> str:
        """Returns the report as lines of `name: value`."""
        memory = "unknown" if self.memory_bytes is None else f"{self.memory_bytes / 2**30:.1f} GiB"
        lines = [
            f"python: {self.python}",
            f"platform: {self.platform}",
            *(f"{name}: {version or 'missing'}" for name, version in self.packages.items()),
            f"cpu: {self.cpu}, {self.cores} cores usable, {self.torch_threads or 'unknown'} torch threads",
            f"memory: {memory}",
            f"free disk here: {self.free_disk_bytes / 2**30:.1f} GiB",
            f"gpus: {', '.join(self.gpus) or 'none'}",
            f"bfloat16 on the CPU: {self.bfloat16_on_cpu}",
            f"float32 products on the CPU: {self.products_on_cpu}",
            *(f"extra [{name}]: {state}" for name, state in self.extras.items()),
            *(f"durability: {remark}" for remark in self.durability or ("no remarks",)),
            *(f"{name}={value}" for name, value in self.environment.items()),
        ]
        return "\n".join(lines)


def doctor(config: JobConfig) -> DoctorReport:
    """Looks at this machine and installation; needs no network and leaves nothing behind."""
    gpus, threads, bfloat16 = probe_torch()
    return DoctorReport(
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        cpu=_cpu_model(),
        cores=cores(),
        memory_bytes=memory_bytes(),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=gpus,
        torch_threads=threads,
        bfloat16_on_cpu=bfloat16,
        products_on_cpu=_products(),
        extras=extras_state(),
        durability=_durability(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _products() -> str:
    """Asks `llara.onednn` in a child process: it tries a product."""
    try:
        child = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return "unknown"
    return child.stdout.strip() or "unknown"


def extras_state() -> dict[str, str]:
    """Returns, per extra of the package, `installed` or the command that installs it."""
    wanted: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("llara") or []:
        match = re.match(r"([\w.-]+).*;.*\bextra\s*==\s*[\"']([\w-]+)[\"']", requirement)
        if match:
            wanted.setdefault(match[2], []).append(match[1])
    return {
        extra: "installed" if all(_version(name) for name in names) else f"pip install 'llara[{extra}]'"
        for extra, names in sorted(wanted.items())
    }


def _durability() -> tuple[str, ...]:
    """What this folder's file system cannot promise. It only says so when it is used: a small file is written."""
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".tmp-doctor-") as folder:
            write_atomic(Path(folder) / "probe", b"probe")
    except (OSError, StorageError) as error:
        return (f"this folder cannot be written: {error}", *durability_notes())
    return tuple(durability_notes())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()
