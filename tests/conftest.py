"""Fixtures that every test may use."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.encoding.small_disk import SmallDisk

# Two test processes must not fight for the cores, and no test may reach a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts what it runs in the background with SIGINT ignored, and children would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference values beside the project; skips where it is absent."""
    folder = Path(os.environ.get("LLARA_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder


@pytest.fixture
def recipes_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a test import the scripts of recipes/, as they import each other, and forgets them after it."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    yield
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == ROOT / "recipes":
            del sys.modules[name]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of as many pages as a test says; skips with the reason where none can be mounted."""
    disk = SmallDisk(tmp_path)
    if disk.why_not:
        pytest.skip(disk.why_not)
    yield disk
    disk.unmount()
