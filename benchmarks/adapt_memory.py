"""Peak memory of adaptation's data side, on a corpus and on one ten times as large.

    python benchmarks/adapt_memory.py [--documents 20000] [--runs 3] [--formats jsonl jsonl.gz parquet text]

A child prepares the chunks of a made-up corpus (reading, leaving out copies, finding sentences, tokenising with the
model `mini`, writing), picks what is held out, and makes the forward passes of 50 batches from all over a sample of the
corpus. What is compared is the peak resident memory of the process from the moment when the model was loaded; what that
adds to the memory of that moment is shown beside it. Sizes take turns. Needs Linux. The last line is one JSON object.
"""

import argparse
import gzip
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FORMATS = ("jsonl", "jsonl.gz", "parquet", "text")
TARGET = 1.10  # peak at ten times the size, as a multiple of the peak at the size
BATCHES = 50
WORDS = 20_000  # of the made-up language, so that its words are rarer the more text there is


def texts(documents: int) -> Iterator[str]:
    """Documents of 30 to 90 words in sentences of 5 to 20; one in fifty is a copy."""
    rng = np.random.default_rng(0)
    text = ""
    for number in range(documents):
        if number % 50 != 49:
            words = [f"w{word:x}" for word in rng.zipf(1.2, int(rng.integers(30, 90))) % WORDS]
            for end in np.cumsum(rng.integers(5, 20, 20)):
                if end < len(words):
                    words[end] = f"{words[end]}. The"
            text = " ".join(words) + "."
        yield text


def write_corpus(path: Path, documents: int) -> None:
    """Writes them in the format that the name tells; as text, each is a file, a thousand to a folder."""
    rows = ({"_id": f"d{number}", "title": "", "text": text} for number, text in enumerate(texts(documents)))
    if path.name.endswith(".text"):
        for number, row in enumerate(rows):
            place = path / f"{number // 1000:05d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:07d}.txt").write_text(row["text"], encoding="utf-8")
    elif path.name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        schema = pa.schema([(name, pa.string()) for name in ("_id", "title", "text")])
        with parquet.ParquetWriter(path, schema) as writer:
            while batch := list(itertools.islice(rows, 10_000)):
                writer.write_table(pa.Table.from_pylist(batch, schema))
    else:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def memory(what: str) -> int:
    """The resident memory of this process in bytes: VmRSS is that of now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def forget_peak() -> None:
    """Lets the peak begin anew; loading a model takes more for a moment than what is measured here."""
    Path("/proc/self/clear_refs").write_text("5")


def child(corpus: Path, folder: Path) -> None:
    """Prepares and reads the corpus in this process, and prints what that took."""
    import time

    from llara.config import AdaptConfig
    from llara.loading import load_model
    from llara.training.adapt import assemble, choose_passes, objective_of, prepare

    config = AdaptConfig(model="mini", corpus=(corpus,), output=folder / "model", device="cpu", max_chunks=10_000)
    model = load_model(config, for_training=True, new_template=True)
    plan = choose_passes(objective_of(config, model), model, model.bind(), config)
    model.encode(["warm"], "query")
    forget_peak()
    before, began = memory("VmRSS"), time.perf_counter()
    chunks = prepare(folder / "chunks", config, model)
    prepared = time.perf_counter() - began
    _, source = assemble(config, model, plan, chunks)
    assert source.batches is not None
    picked = np.random.default_rng(0).integers(source.batches, size=BATCHES).tolist()
    passes = sum(len(source.passes(number)) for number in picked) + len(source.held_out())
    peak = memory("VmHWM")
    figures = {"peak": peak, "added": peak - before, "seconds": prepared, "passes": passes}
    print(json.dumps(figures | {"chunks": len(chunks), "documents": chunks.documents, "copies": chunks.copies}))


def measure(corpus: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", str(corpus), folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["jsonl"])
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    sizes = (arguments.documents, 10 * arguments.documents)
    figures: dict[str, float] = {}
    for kind in arguments.formats:
        figures |= compare(kind, sizes, arguments.runs)
    judged = [f"{kind} ratio" for kind in arguments.formats]
    met = all(figures[name] <= TARGET for name in judged)
    print(json.dumps({"name": "adapt_memory", "figures": figures, "target": dict.fromkeys(judged, TARGET), "met": met}))


def compare(kind: str, sizes: tuple[int, int], runs: int) -> dict[str, float]:
    """Prints the peaks of both sizes in a format, and returns its figures."""
    results: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        corpora = {size: Path(folder) / f"{size}.{kind}" for size in sizes}
        for size, corpus in corpora.items():
            write_corpus(corpus, size)
        for _ in range(runs):
            for size, corpus in corpora.items():
                results[size].append(measure(corpus))
    figures: dict[str, float] = {}
    for size, found in results.items():
        for name in ("peak", "added"):
            figures[f"{kind} {name}_mb_{size}"] = round(statistics.median(each[name] for each in found) / 2**20, 1)
        figures[f"{kind} prepare_seconds_{size}"] = round(statistics.median(each["seconds"] for each in found), 1)
        peaks = ", ".join(f"{each['peak'] / 2**20:.0f} (+{each['added'] / 2**20:.0f})" for each in found)
        print(f"{kind}: {size:>9,} documents, {int(found[0]['chunks']):,} chunks: peak {peaks} MB", flush=True)
    for name in ("peak", "added"):
        low, high = (figures[f"{kind} {name}_mb_{size}"] for size in sizes)
        figures[f"{kind} {'ratio' if name == 'peak' else 'added_ratio'}"] = round(high / low, 3)
    return figures


if __name__ == "__main__":
    main()
