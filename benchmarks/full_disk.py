"""Encoding and indexing on disks that are too small, at 20 sizes each, among them exactly one page short.

    python benchmarks/full_disk.py [--sizes 20]

The disk is a tmpfs, so the script needs the right to mount one; where it has not, it says so and measures nothing. On
each size a command runs in a process of its own: `llara encode` with a tiny random model, and `llara index` for every
type. It must end with exit code 2 and an error that names the path, the space needed and the space there is, not by a
signal (SIGBUS is what a mapped file on a full disk gives). Then the disk is made larger, and the same command must go
on, leave what was finished untouched, and end with the bytes of an undisturbed run. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common.checkout  # noqa: F401 - the next imports need it
from common.tiny_job import encode, prepare

from tests.children import Ended, command, preload, run
from tests.damage import index_types
from tests.encoding.crash import Finished
from tests.encoding.helpers import tree
from tests.encoding.small_disk import PAGE, SmallDisk, least_pages, names_path_and_space, sizes_below

ROOM = 4_000  # pages; more than any of the jobs takes


class Job(NamedTuple):
    """A command that writes `output` on the disk, run in `folder`."""

    name: str
    run: Callable[[], int]
    folder: Path


def jobs(root: Path, disk: SmallDisk) -> list[Job]:
    """Returns the commands; those that index need vectors, which are made here, beside the disk."""
    work = root / "work"
    work.mkdir()
    made = run(encode("vectors"), work)
    assert made.status == 0, made.err
    found = [Job("encode", encode(str(disk.output)), work)]
    for kind in index_types():
        given = ["--vectors", "vectors"] if kind != "bm25" else ["--corpus", "../corpus.jsonl"]
        words = ["index", *given, "--type", kind, "--output", disk.output, "--json", "--offline"]
        found.append(Job(f"index {kind}", command(*words), work))
    return found


def attempt(job: Job, disk: SmallDisk, pages: int) -> Ended:
    """Runs a job on a fresh disk of this size, which stays."""
    disk.mount(pages)
    return run(job.run, job.folder)


def fault_at(job: Job, disk: SmallDisk, pages: int, expected: dict[str, str]) -> str:
    """Returns what was wrong on a disk of this size; empty where nothing was."""
    ended = attempt(job, disk, pages)
    if ended.status != 2:
        return f"ended with {ended.status}: {ended.err}"
    if "Traceback" in ended.err or not names_path_and_space(ended.err, disk.path):
        return f"does not name path and space: {ended.err}"
    finished = Finished(disk.output)
    disk.resize(ROOM)
    again = run(job.run, job.folder)
    if again.status:
        return f"does not go on where there is room: {again.err}"
    reused = json.loads(again.out).get("reused_shards", len(finished.shards))
    return finished.fault(reused, expected)


def measure(job: Job, disk: SmallDisk, count: int) -> dict[str, int]:
    """Tries a job on `count` sizes that are too small; prints and returns what came of it."""
    ended = attempt(job, disk, ROOM)
    assert ended.status == 0, ended.err
    expected = tree(disk.output)
    least = least_pages(lambda pages: attempt(job, disk, pages).status == 0, ROOM)
    sizes = sizes_below(least, count)
    faults = {pages: fault for pages in sizes if (fault := fault_at(job, disk, pages, expected))}
    for pages, fault in faults.items():
        print(f"{job.name}, {pages} of {least} pages: {fault}")
    tried = f"{len(sizes)} sizes of 1 to {sizes[-1]}"
    print(f"{job.name}: fits on {least} pages of {PAGE:,} bytes; {tried}: {len(faults)} faults", flush=True)
    return {"least_pages": least, "sizes": len(sizes), "largest": sizes[-1], "faults": len(faults)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=20)
    count = parser.parse_args().sizes
    preload("llara.index.build", "faiss", "bm25s", "scipy.sparse")
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = prepare(Path(folder))
        (root / "disk").mkdir()
        disk = SmallDisk(root / "disk")
        if disk.why_not:
            print(disk.why_not)
        else:
            try:
                found = {job.name: measure(job, disk, count) for job in jobs(root, disk)}
            finally:
                disk.unmount()
    figures = {
        f"{name.replace(' ', '_')}_{what}": value for name, each in found.items() for what, value in each.items()
    }
    # A small index fits on fewer than 20 pages; then each size below is tried.
    enough = all(each["sizes"] >= min(20, each["largest"]) for each in found.values())
    short = all(each["largest"] == each["least_pages"] - 1 for each in found.values())
    met = enough and short and not any(each["faults"] for each in found.values())
    target = {"sizes": 20, "faults": 0}
    print(json.dumps({"name": "full_disk", "figures": figures, "target": target, "met": met if found else None}))


if __name__ == "__main__":
    main()
