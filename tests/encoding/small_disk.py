"""A disk of any size, on which runs find no room: a tmpfs."""

import mmap
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

PAGE = mmap.PAGESIZE


class SmallDisk:
    """A tmpfs whose size can be set; `why_not` says why there is none, empty where it can be mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = path / "output"
        self.why_not = ""
        try:
            self.mount(1)
        except (OSError, subprocess.CalledProcessError) as error:
            stderr = error.stderr.decode(errors="replace").strip() if hasattr(error, "stderr") else ""
            self.why_not = f"a tmpfs cannot be mounted here: {stderr or error}"

    def mount(self, pages: int) -> None:
        """Puts a fresh disk of this many pages in the place of the one there is."""
        self.unmount()
        self._run("mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", str(self.path))

    def resize(self, pages: int) -> None:
        """Changes the size; what is on the disk stays."""
        self._run("mount", "-o", f"remount,size={pages * PAGE}", str(self.path))

    def unmount(self) -> None:
        """Takes the disk away, where there is one."""
        if self.path.is_mount():
            self._run("umount", "--lazy", str(self.path))

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


def least_pages(fits: Callable[[int], bool], most: int) -> int:
    """Returns the smallest number of pages on which a run fits; `most` must be enough."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def sizes_below(least: int, count: int) -> list[int]:
    """Returns `count` sizes in pages on which a run does not fit: the first ones, some between, and one page short."""
    sizes = {1, 2, 3, least - 2, least - 1, *(least * step // (count - 4) for step in range(1, count - 4))}
    more = (pages for pages in range(4, least) if pages not in sizes)
    while len(sizes) < min(count, least - 1):
        sizes.add(next(more))
    return sorted(size for size in sizes if 0 < size < least)


def names_path_and_space(message: str, disk: Path) -> bool:
    """Tells whether an error names a path on the disk, the space needed and the space there is."""
    return str(disk) in message and bool(re.search(r"needs [^;]*\d+ bytes.*, [\d,]+ (bytes )?are free", message))
