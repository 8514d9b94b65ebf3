"""Lets a script import what it shares with the tests: importing this puts the checkout's own folder on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def scratch() -> str | None:
    """Returns the folder for files that need no disk: syncing thousands of them takes minutes, and shows nothing.

    What a process wrote before it was killed is the system's to keep, on a disk and in memory alike.
    """
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() else None
