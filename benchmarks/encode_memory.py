"""Peak memory of `llara encode` on a hundred thousand short passages, and on a million.

    python benchmarks/encode_memory.py [--passages 100000] [--runs 1] [--tiny]

The command runs in a process of its own, with the check for duplicate ids and with one duplicate in a thousand rows.
A stand-in gives vectors of dimension 256 at once where a model would: what is measured is everything else, from reading
the corpus to publishing its shards. With `--tiny` a tiny random model encodes, which takes some times as long. The
figure is the peak resident memory of the process, libraries included; beside it what that is above the memory with the
libraries loaded. Needs Linux. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common.checkout  # noqa: F401 - the next imports need it
from common import stand_in
from common.tiny_job import save_tiny

from tests.children import command, preload, run

TARGET = 1.05  # peak at ten times the passages, as a multiple of the peak at the passages


def write_corpus(path: Path, passages: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(passages):
            own = number - 500 if number % 1_000 == 999 else number
            file.write(json.dumps({"_id": f"d{own}", "text": f"short passage {number} of the corpus"}) + "\n")


def memory(what: str) -> int:
    """Returns the resident memory of this process in bytes: VmRSS is that of now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def measured(encode: Callable[[], int]) -> Callable[[], int]:
    """Returns the job that runs the command and then prints what it took as one more line."""

    def job() -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of the imports
        before, began = memory("VmRSS"), time.perf_counter()
        code = encode()
        peak = memory("VmHWM")
        print(json.dumps({"peak": peak, "added": peak - before, "seconds": time.perf_counter() - began}))
        return code

    return job


def measure(folder: Path, passages: int, tiny: bool) -> dict[str, float]:
    words = ["--corpus", f"{passages}.jsonl", "--output", "vectors"]
    model = ["--model", folder / "model", "--offline", "--device", "cpu"]
    encode = command("encode", *model, *words, "--json") if tiny else stand_in.encode(*words)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        (Path(work) / f"{passages}.jsonl").symlink_to(folder / f"{passages}.jsonl")
        ended = run(measured(encode), Path(work))
    assert ended.status == 0, ended.err
    result, found = map(json.loads, ended.out.splitlines())
    assert result["rejected"] == passages // 1_000, "duplicates are what is rejected"
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    preload()
    sizes = (options.passages, 10 * options.passages)
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder) / "model")
        for size in sizes:
            write_corpus(Path(folder) / f"{size}.jsonl", size)
        for _ in range(options.runs):
            for size in sizes:
                found[size].append(measure(Path(folder), size, options.tiny))
    figures: dict[str, float] = {}
    for size, runs in found.items():
        peak, added = (statistics.median(each[name] for each in runs) / 2**20 for name in ("peak", "added"))
        figures |= {f"peak_mb_{size}": round(peak, 1), f"added_mb_{size}": round(added, 1)}
        seconds = statistics.median(each["seconds"] for each in runs)
        print(f"{size:>9,} passages: peak {peak:.1f} MB (+{added:.1f}), {seconds:.0f} s, {options.runs} runs")
    figures["ratio"] = round(figures[f"peak_mb_{sizes[1]}"] / figures[f"peak_mb_{sizes[0]}"], 3)
    met = figures["ratio"] <= TARGET
    print(json.dumps({"name": "encode_memory", "figures": figures, "target": {"ratio": TARGET}, "met": met}))


if __name__ == "__main__":
    main()
