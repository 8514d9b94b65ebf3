"""What `llara plan` says of adapt, encode and index beside what these then take: time, memory and disk.

    python benchmarks/plan.py [--corpus PATH] [--steps 60] [--rounds 3] [--folder DIR] [--only encode]

Each job is planned and then run with `mini`, each in a process of its own: wall time, peak resident memory of the
process, and the most bytes that its folder held, looked at as often as two per cent of a core allow. The corpus is
SciFact's where `shared/data` is (see CONTRIBUTING.md), or any other. The last line is one JSON object: per job and
quantity, the plan over the measurement, the median of the rounds; the target is to be within a fifth.

A calibration measures the machine as it is in those seconds, so both sides need it to be doing the same otherwise:
best nothing. The load is printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 0.2
SHORTEST, SHARE = 0.002, 0.02  # seconds between two looks at a folder, and the time that looking may take
MAIN = "import sys; from llara.cli import main; sys.exit(main(sys.argv[1:]))"
SHARED = Path(os.environ.get("LLARA_SHARED", Path(__file__).resolve().parents[2] / "shared"))
QUANTITIES = ("seconds", "memory", "disk")


class Taken(NamedTuple):
    """What a run took, or was planned to take: seconds, and bytes of memory and disk at most."""

    seconds: float
    memory: float
    disk: float


def call(arguments: Sequence[object], watched: Path | None = None) -> tuple[Taken, str]:
    """Runs llara; returns what it took and printed. `watched` is the folder whose size is looked at."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        assert watched is not None
        pause = SHORTEST
        while not done.wait(pause):
            looked = time.perf_counter()
            most = max(most, size_of(watched))
            pause = max(SHORTEST, (time.perf_counter() - looked) / SHARE)

    watcher = threading.Thread(target=watch)
    if watched:
        watcher.start()
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        printed = process.stdout.read().decode()
        complaint = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    done.set()
    if watched:
        watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\n{complaint}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Taken(seconds, usage.ru_maxrss * unit, max(most, size_of(watched) if watched else 0)), printed


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; those that go while it is looked at count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def planned(arguments: Sequence[object]) -> Taken:
    values: dict[str, Any] = json.loads(call(["plan", *arguments, "--json", "--quiet"])[1])
    return Taken(values["seconds_in_all"], values["memory"], values["disk_peak"])


def jobs(corpus: Path, steps: int, folder: Path) -> dict[str, list[object]]:
    """The jobs by name; an index of vectors needs those of the job before it."""
    base: list[object] = ["--model", "mini", "--corpus", corpus]
    vectors = folder / "encode" / "vectors"
    return {
        "adapt": ["adapt", *base, "--steps", steps, "--output", folder / "adapt" / "model"],
        "encode": ["encode", *base, "--output", vectors],
        "index (flat)": ["index", "--vectors", vectors, "--output", folder / "flat" / "index"],
        **{
            f"index ({kind})": ["index", "--type", kind, "--vectors", vectors, "--output", folder / kind / "index"]
            for kind in ("hnsw", "ivfpq", "rabitq")
        },
        "index (bm25)": ["index", "--type", "bm25", "--corpus", corpus, "--output", folder / "bm25" / "index"],
    }


def compare(corpus: Path, steps: int, folder: Path, only: Sequence[str]) -> dict[str, tuple[Taken, Taken]]:
    """Plans and runs each job once; returns both by job."""
    found = {}
    for name, arguments in jobs(corpus, steps, folder).items():
        if name not in (only or [name]):
            continue
        place = Path(str(arguments[-1])).parent
        place.mkdir(parents=True, exist_ok=True)
        plan = planned(arguments)
        found[name] = plan, call([*arguments, "--quiet"], place)[0]
        show(name, *found[name])
    return found


def show(name: str, plan: Taken, real: Taken) -> None:
    units = {"seconds": (1.0, "s"), "memory": (1e6, "MB"), "disk": (1e6, "MB")}
    parts = [
        f"{quantity} {getattr(plan, quantity) / scale:.1f} planned, {getattr(real, quantity) / scale:.1f} {unit}"
        f" ({getattr(plan, quantity) / getattr(real, quantity):.2f})"
        for quantity, (scale, unit) in units.items()
    ]
    print(f"{name:<14} {'; '.join(parts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=SHARED / "data" / "scifact" / "corpus.jsonl.gz")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=(), help="names of jobs, as they are printed")
    options = parser.parse_args()
    if not options.corpus.exists():
        print(f"{options.corpus} is not here; give another with --corpus")
        return
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rounds.append(compare(options.corpus, options.steps, Path(folder), options.only))
    figures = {
        f"{job} {quantity}": round(
            statistics.median(getattr(each[job][0], quantity) / getattr(each[job][1], quantity) for each in rounds), 3
        )
        for job in rounds[0]
        for quantity in QUANTITIES
    }
    met = all(1 - TOLERANCE <= value <= 1 + TOLERANCE for value in figures.values())
    target = f"plan over measurement within {TOLERANCE:.0%} of 1"
    print(json.dumps({"name": "plan", "figures": figures, "target": target, "met": met}))


if __name__ == "__main__":
    main()
