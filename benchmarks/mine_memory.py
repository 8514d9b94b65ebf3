"""Peak memory of `llara mine` over a million passages and ten thousand queries of dimension 256.

    python benchmarks/mine_memory.py [--passages 1000000] [--queries 10000] [--folder DIR]

The passages' vectors are made up, scattered around those of the queries, so that every query has hits of its own. All
else is real: the vectors folder with its texts, the flat index, the model `mini` that encodes the queries, and
the command in a child, whose peak resident memory is what is measured; mapped files that are in memory count. Needs
about 2.5 GB of disk. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llara.config import IndexConfig, ModelConfig
from llara.data import Row
from llara.encoding.shards import write_vectors
from llara.index.build import build_index
from llara.records import Document
from llara.retriever import Retriever

TARGET_GB = 2.0
DIM = 256
NOISE = 0.2  # length of what is added to a query's vector to make a passage's
SHARD = 10_000  # rows per shard, as `llara encode` has it
WORDS = 5_000  # of the made-up language
MINE = "import sys; from llara.cli import main; sys.exit(main(sys.argv[1:]))"


def sentence(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(f"w{word}" for word in rng.zipf(1.3, int(rng.integers(least, most))) % WORDS)


def rows(count: int) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    for number in range(count):
        text = {"_id": f"d{number}", "title": f"Title {number}", "text": sentence(rng, 30, 90)}
        yield Row("made up", number + 1, json.dumps(text).encode(), "json")


def make_index(folder: Path, count: int, centres: Any, identity: Any) -> Path:
    rng = np.random.default_rng(1)
    done = 0

    def encode(documents: list[Document]) -> Any:
        nonlocal done
        around = centres[np.arange(done, done + len(documents)) % len(centres)]
        done += len(documents)
        vectors = around + NOISE * rng.standard_normal(around.shape, np.float32) / DIM**0.5
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    about = {"model_path": "mini"}
    write_vectors(folder / "vectors", rows(count), encode, identity, DIM, "float32", SHARD, about=about)
    build_index(IndexConfig(vectors=folder / "vectors", output=folder / "index"))
    return folder / "index"


def make_queries(folder: Path, count: int, passages: int) -> tuple[Path, Path, list[str]]:
    rng = np.random.default_rng(2)
    texts = [sentence(rng, 4, 12) for _ in range(count)]
    queries, qrels = folder / "queries.tsv", folder / "qrels.tsv"
    queries.write_text("".join(f"q{number}\t{text}\n" for number, text in enumerate(texts)))
    qrels.write_text("".join(f"q{number}\t0\td{number % passages}\t1\n" for number in range(count)))
    return queries, qrels, texts


def peak_of(arguments: list[object]) -> tuple[float, float, dict[str, Any]]:
    """Runs the command in a child; returns its peak memory in GB, its seconds, and its result."""
    began = time.perf_counter()
    command = [sys.executable, "-c", MINE, *map(str, arguments), "--json", "--offline"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the command ended with {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit / 1e9, time.perf_counter() - began, json.loads(printed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        queries, qrels, texts = make_queries(folder, options.queries, options.passages)
        retriever = Retriever.for_job(ModelConfig(model="mini", device="cpu"))
        index = make_index(folder, options.passages, retriever.encode_queries(texts), retriever.identity)
        mined = folder / "mined.jsonl"
        given = ["--index", index, "--queries", queries, "--qrels", qrels, "--output", mined]
        peak, seconds, result = peak_of(["mine", *given, "--device", "cpu"])
        print(f"{result['queries']:,} queries, {result['negatives']:,} negatives, {mined.stat().st_size / 1e6:.0f} MB")
    print(f"peak memory {peak:.2f} GB, {seconds:.0f} s, {options.passages:,} passages of dimension {DIM}")
    figures = {"peak_gb": round(peak, 3), "seconds": round(seconds, 1), "negatives": result["negatives"]}
    figures |= {"passages": options.passages, "queries": options.queries, "dim": DIM}
    print(json.dumps({"name": "mine_memory", "figures": figures, "target": {"peak_gb": TARGET_GB}, "met": peak < 2.0}))


if __name__ == "__main__":
    main()
