"""How fast and how well indexes of vectors are searched: flat beside raw FAISS, approximate types beside flat.

    python benchmarks/index.py [--folder DIR] [--parts vectors flat curves disk report] [--threads 2] [--clock cpu]

vectors   encodes 20,000 passages and 2,000 queries with `mini` and extends them with noise to 1M x 256 and 10M x 256
          (see common/real_vectors.py)
flat      queries per second of a flat index of 1M vectors and of FAISS' own IndexFlatIP over the same file, in turns
curves    recall@10 against queries per second of each approximate type over the same vectors, beside flat
disk      10M vectors searched from disk by a process whose control group may hold 1.5 GB, page cache included
report    draws the curves and prints all figures

Each part keeps its figures in DIR, and its files, of which a later run uses what is there. All parts need about 22 GB
of disk and 4 GB of memory. On a machine that stays busy, `--threads 1 --clock cpu` counts processor time. The last line
is one JSON object.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common.limits import memory_limit
from common.real_vectors import DIM, encode_real, extend

from llara.config import IndexConfig
from llara.encoding.arrays import Array, open_array
from llara.index.base import MANIFEST, Index, Manifest, write_ids
from llara.index.faiss import Effort
from llara.index.flat import FILE, write_flat
from llara.index.opening import open_index
from llara.index.shape import TYPES, Shape, write_faiss

PARTS = ("vectors", "flat", "curves", "disk", "report")
REAL, QUERIES = 20_000, 2_000
TOP_K = 10
LIMIT = 1_500_000_000
ASKED_FROM_DISK = 200
DISK = {"nlist": 1024}  # fewer lists than usual for 10M: to find the list of each vector takes most of the building
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# The types of the curves with the settings of their building, and how hard each is searched.
CURVES: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "hnsw": ("hnsw", {}, "ef_search", (16, 24, 32, 48, 64, 96, 128, 256, 512)),
    "ivfpq": ("ivfpq", {}, "nprobe", (4, 8, 16, 32, 64, 128, 256)),
    "ivfpq, 4 bits": ("ivfpq", {"pq_bits": 4}, "nprobe", (4, 8, 16, 32, 64, 128, 256)),
    "rabitq": ("rabitq", {}, "nprobe", (4, 8, 16, 32, 64, 128, 256)),
}
TARGETS = {"flat / raw FAISS": 0.9, "fastest / flat at recall 0.97": 20, "resident GB from disk": 1.5}


def make(folder: Path, kind: str, vectors: Array, **settings: Any) -> Path:
    """Builds an index folder over a file of vectors, or finds it built; as `llara index` does, without texts."""
    if not (folder / MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        count, dim = vectors.shape
        shards: Iterator[Array] = (vectors[start : start + 50_000] for start in range(0, count, 50_000))
        began = time.perf_counter()
        if kind in TYPES:
            config = IndexConfig(type=kind, vectors=folder, output=folder, **settings)  # type: ignore[arg-type]
            shape = Shape.of(config, count, dim)
            files, made = write_faiss(folder, shards, count, str(vectors.dtype), shape)
        else:
            files, made = write_flat(folder, shards, count, dim)
        seconds = time.perf_counter() - began
        files |= write_ids(folder, (f"d{number}" for number in range(count)))
        Manifest(kind, count, {**made, "seconds": seconds}, None, "mini", "benchmark", "", files).publish(folder)
        print(f"{folder.name}: built in {seconds:.0f} s", flush=True)
    return folder


def open_vectors(options: argparse.Namespace, count: int, dtype: str) -> tuple[Array, Array]:
    """Returns the vectors, memory-mapped, and the queries."""
    real, queries = encode_real(options.folder, REAL, QUERIES)
    path, length = extend(options.folder, real, count, dtype)
    save(options, "vectors", {"real": len(real), "queries": len(queries), "noise": round(length, 4)})
    return open_array(path, dtype, (count, DIM)), queries


def timed(options: argparse.Namespace, search: Callable[[], Any]) -> tuple[float, Any]:
    clock = CLOCKS[options.clock]
    began = clock()
    found = search()
    return clock() - began, found


def recall(found: Array, truth: Array) -> float:
    """Returns the share of the true first ten that are among those found."""
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return sum(len(set(ours) & set(theirs)) for ours, theirs in pairs) / truth.size


# The parts -----------------------------------------------------------------------------------------------------------


def part_vectors(options: argparse.Namespace) -> None:
    open_vectors(options, options.vectors, "float32")
    open_vectors(options, options.disk_vectors, "float16")


def part_flat(options: argparse.Namespace) -> None:
    import faiss

    vectors, queries = open_vectors(options, options.vectors, "float32")
    folder = make(options.folder / "flat", "flat", vectors)
    ours = open_index(folder)
    raw = faiss.read_index(str(folder / FILE), faiss.IO_FLAG_MMAP_IFC)
    batch = queries[: options.batch]
    times: dict[str, list[float]] = {"llara": [], "faiss": []}
    for round_ in range(options.runs + 1):
        for name, search in (("llara", lambda: ours.search(batch, TOP_K)), ("faiss", lambda: raw.search(batch, TOP_K))):
            seconds, _ = timed(options, search)
            if round_:  # the first round brings the file into memory
                times[name].append(seconds)
    rates = {name: round(len(batch) / statistics.median(each), 1) for name, each in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["llara"], times["faiss"], strict=True))
    save(options, "flat", {"queries_per_second": rates, "ratio": round(ratio, 3), "batch": len(batch)})


def part_curves(options: argparse.Namespace) -> None:
    vectors, queries = open_vectors(options, options.vectors, "float32")
    flat = open_index(make(options.folder / "flat", "flat", vectors))
    truth = flat.search(queries, TOP_K).positions
    curves: dict[str, Any] = load(options, "curves").get("curves", {})
    for name in options.types:
        kind, settings, dial, values = CURVES[name]
        folder = make(options.folder / name.replace(", ", "-").replace(" ", "-"), kind, vectors, **settings)
        built = Manifest.read(folder)
        beside = []
        points: dict[int, tuple[list[float], float]] = {value: ([], 0.0) for value in values}
        for _ in range(options.runs):
            beside.append(timed(options, lambda: flat.search(queries[: options.batch], TOP_K))[0] / options.batch)
            for value in values:
                index = open_index(folder, effort=Effort(**{dial: value}))
                index.search(queries[:64], TOP_K)
                seconds, found = timed(options, lambda index=index: index.search(queries, TOP_K))
                points[value] = ([*points[value][0], seconds / len(queries)], recall(found.positions, truth))
        flat_seconds = statistics.median(beside)
        rows = [
            {
                dial: value,
                "queries_per_second": round(1 / statistics.median(seconds), 1),
                "recall": round(share, 4),
                "times_flat": round(flat_seconds / statistics.median(seconds), 1),
            }
            for value, (seconds, share) in points.items()
        ]
        size = sum(record.bytes for record in built.files.values())
        curves[name] = {
            "points": rows,
            "flat_queries_per_second": round(1 / flat_seconds, 1),
            "build_seconds": round(built.settings["seconds"]),
            "settings": {key: value for key, value in built.settings.items() if key not in ("header", "seconds")},
            "gb": round(size / 1e9, 2),
            "gb_searched": round(built.files[FILE].bytes / 1e9, 2),
        }
        save(options, "curves", {"curves": curves})
        for row in rows:
            print(name, row, flush=True)


def part_disk(options: argparse.Namespace) -> None:
    vectors, queries = open_vectors(options, options.disk_vectors, "float16")
    folder = make(options.folder / f"disk-{options.disk_type}", options.disk_type, vectors, **DISK)
    queries = queries[:ASKED_FROM_DISK]
    truth = exact(options, vectors, queries)
    forget(options.folder)
    command = [sys.executable, __file__, "--folder", str(options.folder), "--parts", "child"]
    command += ["--disk-type", options.disk_type, "--threads", str(options.threads)]
    with memory_limit(LIMIT) as limit:
        child = subprocess.run(command, preexec_fn=limit.enter, stdout=subprocess.PIPE, text=True, check=True)
        peak = limit.peak
    figures = json.loads(child.stdout.splitlines()[-1])
    found = np.load(options.folder / "disk-found.npy")
    figures |= {
        "recall": round(recall(found, truth), 4),
        "group_peak_gb": round(peak / 1e9, 3),
        "limit_gb": LIMIT / 1e9,
    }
    built = Manifest.read(folder)
    size = sum(record.bytes for record in built.files.values())
    figures |= {"gb": round(size / 1e9, 2), "build_seconds": round(built.settings["seconds"]), "type": built.type}
    save(options, "disk", figures)


def part_child(options: argparse.Namespace) -> None:
    """Runs inside the group: opens the index from disk, searches it twice, and says what that took."""
    queries = np.load(options.folder / f"queries-{QUERIES}.npy")[:ASKED_FROM_DISK]
    began = time.perf_counter()
    index: Index[Any] = open_index(options.folder / f"disk-{options.disk_type}")
    opened = time.perf_counter() - began
    rates = []
    for _ in range(2):
        began = time.perf_counter()
        found = index.search(queries, TOP_K)
        rates.append(round(len(queries) / (time.perf_counter() - began), 1))
    np.save(options.folder / "disk-found.npy", found.positions)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(status[name].split()[0]) * 1024 / 1e9 for name in ("VmHWM", "RssAnon")}
    figures = {"first_queries_per_second": rates[0], "second_queries_per_second": rates[1]}
    figures |= {"open_seconds": round(opened, 2), "peak_resident_gb": round(memory["VmHWM"], 3)}
    print(json.dumps({**figures, "anonymous_gb": round(memory["RssAnon"], 3), "queries": len(queries)}))


def exact(options: argparse.Namespace, vectors: Array, queries: Array) -> Array:
    """Returns the true first ten of each query, int64 [queries, 10], from a pass over all vectors."""
    path = options.folder / f"truth-{len(vectors)}-{len(queries)}.npy"
    if not path.exists():
        scores, positions = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start in range(0, len(vectors), 100_000):
            found = queries @ vectors[start : start + 100_000].astype(np.float32).T
            best = np.argpartition(-found, TOP_K, axis=1)[:, :TOP_K]
            scores = np.concatenate([scores, np.take_along_axis(found, best, axis=1)], axis=1)
            positions = np.concatenate([positions, best + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]
        np.save(path, np.take_along_axis(positions, order, axis=1))
    return np.asarray(np.load(path))


def forget(folder: Path) -> None:
    """Drops the files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def part_report(options: argparse.Namespace) -> None:
    flat, curves, disk = (load(options, name) for name in ("flat", "curves", "disk"))
    if curves:
        draw(options, curves["curves"])
    best = {
        name: max((row["times_flat"] for row in curve["points"] if row["recall"] >= 0.97), default=0.0)
        for name, curve in curves.get("curves", {}).items()
    }
    fastest = max(best.values(), default=math.nan)
    figures: dict[str, Any] = {"flat / raw FAISS": flat.get("ratio"), "times flat at recall 0.97": best, "disk": disk}
    figures |= {"vectors": load(options, "vectors"), "threads": options.threads, "clock": options.clock}
    met = (flat.get("ratio") or 0) >= TARGETS["flat / raw FAISS"] and fastest >= 20
    met = met and disk.get("group_peak_gb", math.inf) <= LIMIT / 1e9 + 0.001
    print(json.dumps({"name": "index", "figures": figures, "target": TARGETS, "met": met}))


def draw(options: argparse.Namespace, curves: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, curve in curves.items():
        points = [(row["recall"], row["queries_per_second"]) for row in curve["points"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{name} ({curve['gb_searched']} GB)")
    flat = statistics.median(curve["flat_queries_per_second"] for curve in curves.values())
    axes.axhline(flat, color="black", linewidth=1, label="flat, recall 1")
    axes.axhline(20 * flat, color="grey", linewidth=1, linestyle=":", label="20 times flat")
    axes.axvline(0.97, color="grey", linewidth=1, linestyle="--", label="recall 0.97")
    unit = "processor second" if options.clock == "cpu" else "second"
    axes.set(xlabel="recall@10", ylabel=f"queries per {unit}, {options.threads} thread(s)", yscale="log")
    axes.set_title(
        f"{options.vectors:,} vectors of 256: {REAL:,} of real text by mini, the rest with noise", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(options.folder / "index.png", dpi=130)


def save(options: argparse.Namespace, part: str, figures: dict[str, Any]) -> None:
    (options.folder / f"{part}.json").write_text(json.dumps(figures, indent=1) + "\n")
    if part != "curves":
        print(part, json.dumps(figures), flush=True)


def load(options: argparse.Namespace, part: str) -> dict[str, Any]:
    path = options.folder / f"{part}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "child"), default=PARTS)
    parser.add_argument("--types", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--disk-type", choices=("ivfpq", "rabitq"), default="rabitq")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--disk-vectors", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=500, help="queries that the flat indexes are asked at once")
    options = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() if options.folder is None else contextlib.nullcontext(options.folder) as folder:
        options.folder = Path(folder)
        options.folder.mkdir(parents=True, exist_ok=True)
        for part in options.parts:
            globals()[f"part_{part}"](options)


if __name__ == "__main__":
    main()
