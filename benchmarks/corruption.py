"""Damaged files: each file of a vectors folder and of every type of index is cut, and single bits in it are flipped.

    python benchmarks/corruption.py [--cuts 400] [--flips 1000] [--kinds vectors flat ...]

A file is cut at every one of its first and last 256 bytes and at `--cuts` seeded places between; opening and reading
the folder must then be an error that names the file. `--flips` single bits are flipped one at a time, at seeded places;
`llara verify` must find each, and so must opening with `--verify`; reading without it must give data or an error. Each
file is tried in a process of its own, which must never die of a signal. The model is none: what encodes is a stand-in,
and the vectors are not computed again. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from common.checkout import scratch

from tests.children import preload, run
from tests.damage import KINDS, Kind, bit_flips, complaint, cut_offsets, files_of, flipped, make_sources

NOTHING = {"cuts": 0, "unnamed": 0, "flips": 0, "missed": 0, "crashes": 0}


def try_file(kind: Kind, folder: Path, name: str, cuts: int, flips: int) -> Callable[[], None]:
    """Returns the job that damages one file in every way, and prints what came of it."""

    def job() -> None:
        path, seen = folder / name, dict(NOTHING)
        good = path.read_bytes()
        for offset in cut_offsets(len(good), name, cuts):
            seen["cuts"] += 1
            message = attempt(path, good[:offset], lambda: kind.read(folder, False), seen)
            if not message.startswith(f"{path}: "):
                seen["unnamed"] += 1
                print(f"{name}, cut at {offset} of {len(good)}: {message or 'nothing was noticed'}")
        for place in bit_flips(len(good), name, flips):
            seen["flips"] += 1
            changed = flipped(good, place)
            attempt(path, changed, lambda: kind.read(folder, False), seen)
            for how, read in (("verify", lambda: kind.verify(folder)), ("--verify", lambda: kind.open(folder, True))):
                if not attempt(path, changed, read, seen):
                    seen["missed"] += 1
                    print(f"{name}, bit {place}: {how} did not notice")
        print(json.dumps(seen))

    return job


def attempt(path: Path, content: bytes, read: Callable[[], None], seen: dict[str, int]) -> str:
    """Reads with other content in a file; whatever is raised that is no error of ours counts as a crash."""
    try:
        return complaint(path, content, read)
    except Exception as error:
        seen["crashes"] += 1
        print(f"{path.name}: {type(error).__name__}: {error}")
        return ""


def measure(name: str, cuts: int, flips: int) -> dict[str, int]:
    """Tries all files of a kind of folder; prints a line for each, and returns the sums."""
    kind, total = KINDS[name], {"files": 0, **NOTHING}
    with tempfile.TemporaryDirectory(dir=scratch()) as made:
        folder = kind.make(make_sources(Path(made)))
        kind.read(folder, True)
        kind.verify(folder)
        for file in files_of(folder):
            ended = run(try_file(kind, folder, file, cuts, flips))
            *said, last = ended.out.splitlines() or [""]
            seen = json.loads(last) if ended.status == 0 else {**NOTHING, "crashes": 1}
            for line in said[:5]:
                print(f"  {line}")
            size = (folder / file).stat().st_size
            print(f"{name}: {file}, {size:,} bytes: {seen if ended.status == 0 else ended}", flush=True)
            total = {what: total[what] + seen.get(what, 1) for what in total}
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=400)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    preload("llara.index.build", "llara.verify", "faiss", "bm25s", "scipy.sparse")
    totals = {name: measure(name, options.cuts, options.flips) for name in options.kinds}
    for name, total in totals.items():
        print(f"{name}: " + ", ".join(f"{number:,} {what}" for what, number in total.items()))
    figures = {f"{name}_{what}": number for name, total in totals.items() for what, number in total.items()}
    faults = sum(total[what] for total in totals.values() for what in ("unnamed", "missed", "crashes"))
    target = {"cuts_per_file": 400, "flips_per_file": 1000, "faults": 0}
    met = not faults and options.cuts >= 400 and options.flips >= 1000
    print(json.dumps({"name": "corruption", "figures": figures | {"faults": faults}, "target": target, "met": met}))


if __name__ == "__main__":
    main()
