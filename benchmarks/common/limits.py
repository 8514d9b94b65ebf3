"""A memory limit that the kernel holds a command to: a control group of its own inside that of this process."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class Limit:
    """A control group with a limit on memory, page cache included."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder, self.version = folder, version

    def enter(self) -> None:
        """Moves the calling process into the group; for `preexec_fn` of a child."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        """The most bytes that the group held at once, page cache included; it is never above the limit."""
        return int((self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")).read_text())


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[Limit]:
    """Makes the group for as long as the block lasts; OSError where this user may not."""
    version, parent = _own_group()
    limit = Limit(parent / f"llara-benchmark-{os.getpid()}", version)
    limit.folder.mkdir()
    try:
        (limit.folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(size))
        yield limit
    finally:
        limit.folder.rmdir()


def _own_group() -> tuple[int, Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return 1, ROOT / "memory" / path.lstrip("/")
    path = Path("/proc/self/cgroup").read_text().split(":", 2)[2].strip()
    return 2, ROOT / path.lstrip("/")
