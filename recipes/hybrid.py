"""Does fusing help? Dense, sparse and BM25 on the test splits of three collections, and the fusions of them.

    python recipes/hybrid.py --model DIR [--output runs/hybrid] [--collections NAME or NAME=PATH ...] [--result FILE.md]

The model is one that llara trained. Each collection is encoded once, vectors and sparse vectors in the same pass, and
searched in three indexes; a fusion takes the runs of two or of all three. Of relative scores there are two: with equal
weights, and with those that give the best nDCG@10 on the dev split, which no training saw.

A finished collection is one JSON file in OUTPUT, which is not measured again with the same model and settings; what
was stopped goes on where it was. LLARA_DATA names the data folder.
"""

import argparse
import datetime
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation import DATA, PACKAGES, PAIRS, QUERIES
from measured import ROOT, commit
from scifact_report import hardware

METRICS = ("nDCG@10", "R@100")
DEPTH = 1000  # hits per query and index that are fused
SINGLES = {"dense": "flat", "sparse": "sparse", "bm25": "bm25"}
FUSIONS = (("dense", "bm25"), ("dense", "sparse"), ("dense", "sparse", "bm25"))
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)  # weights tried on dev beside 1 for dense
RESAMPLES = 10_000
TITLES = {"scifact": "SciFact", "medquad": "MedQuAD by focus", "docs": "Documentation strings"}
Runs = dict[str, dict[str, list[Any]]]


# One collection -------------------------------------------------------------------------------------------------------


def measure(name: str, path: Path, given: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Encodes, indexes, searches and fuses one collection; returns what was found as JSON values."""
    from llara.data import read_qrels
    from llara.evaluate import compare

    folder = given.output / name
    seconds = build(folder, path, given)
    dev, test = (search_all(folder, path, split, given, seconds) for split in ("dev", "test"))
    judged = read_qrels(path, "dev")
    weights = {label(names): best_weights(names, dev, judged) for names in FUSIONS}
    runs = dict(test)
    for names, method, tuned in fusions():
        factors = weights[label(names)] if tuned else None
        runs[system_name(names, method, tuned)] = fuse_runs(names, test, method, factors)
    found = compare(runs, read_qrels(path, "test"), METRICS, permutations=1)
    return {
        "collection": name,
        "settings": dict(settings),
        "made": {"date": datetime.date.today().isoformat(), "commit": commit(), "hardware": hardware()},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "bytes": {single: folder_bytes(folder / single) for single in SINGLES},
        "weights": {each: list(chosen) for each, chosen in weights.items()},
        "means": {system: {metric: round(found.means[system][metric], 5) for metric in METRICS} for system in runs},
        "values": {system: [round(value, 4) for value in found.values[system][METRICS[0]]] for system in runs},
    }


def build(folder: Path, path: Path, given: argparse.Namespace) -> dict[str, float]:
    """Makes vectors and the three indexes; returns the seconds of each stage."""
    from llara.config import EncodeConfig, IndexConfig
    from llara.encoding.encode import encode
    from llara.index.build import build_index

    seconds = {}
    began = time.monotonic()
    chosen = {"sparse": True, "sparse_top_k": given.sparse_top_k, "expansion": given.expansion, "fold": given.fold}
    vectors = folder / "vectors"
    encode(EncodeConfig(model=given.model, device=given.device, corpus=(path,), output=vectors, **chosen))
    seconds["encode"] = time.monotonic() - began
    for single, kind in SINGLES.items():
        began = time.monotonic()
        build_index(IndexConfig(vectors=vectors, output=folder / single, type=kind))
        seconds[f"index {single}"] = time.monotonic() - began
    return seconds


def search_all(folder: Path, path: Path, split: str, given: argparse.Namespace, seconds: dict[str, float]) -> Runs:
    """Returns the run of each index over the queries of a split."""
    from llara.config import SearchConfig
    from llara.data import read_run
    from llara.search import search

    runs: Runs = {}
    for single in SINGLES:
        began = time.monotonic()
        output = folder / f"{single}-{split}.trec"
        model = "" if single == "bm25" else given.model
        where = {"model": model, "device": given.device, "index": folder / single}
        search(SearchConfig(**where, queries=path, split=split, output=output, top_k=DEPTH))
        seconds[f"search {single}, {split}"] = time.monotonic() - began
        runs[single] = {query: list(hits) for query, hits in read_run(output).items()}
    return runs


def fusions() -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yields what is fused, how, and whether with weights from dev."""
    for names in FUSIONS:
        yield from ((names, "rrf", False), (names, "relative", False), (names, "relative", True))


def label(names: Sequence[str]) -> str:
    return "+".join(names)


def system_name(names: Sequence[str], method: str, tuned: bool) -> str:
    return f"{label(names)}, {method}{', dev weights' if tuned else ''}"


def fuse_runs(names: Sequence[str], runs: Runs, method: Any, weights: Any, top_k: int = DEPTH) -> dict[str, list[Any]]:
    from llara.fuse import fusion

    fuse_hits = fusion(method, weights, top_k=top_k)
    queries = dict.fromkeys(query for name in names for query in runs[name])
    return {query: fuse_hits(query, [runs[name].get(query, []) for name in names]) for query in queries}


def best_weights(
    names: Sequence[str], runs: Runs, qrels: Sequence[Any], grid: Sequence[float] = GRID
) -> tuple[float, ...]:
    """Returns the weights of relative scores with the best nDCG@10; of equals, those nearest to 1 each."""
    from llara.evaluate import compare

    tried = [(1.0, *rest) for rest in itertools.product(grid, repeat=len(names) - 1)]
    tried.sort(key=lambda weights: sum(abs(np.log2(weight)) for weight in weights))
    means = []
    for weights in tried:
        fused = fuse_runs(names, runs, "relative", weights, top_k=10)
        means.append(compare({"fused": fused}, qrels, METRICS[:1], permutations=1).means["fused"][METRICS[0]])
    return tried[int(np.argmax(means))]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


# The report -----------------------------------------------------------------------------------------------------------


def report(cells: Sequence[dict[str, Any]], given: argparse.Namespace) -> str:
    from llara.evaluate import markdown_table

    made = [cell["made"] for cell in cells]
    dates, commits, machines = (
        ", ".join(sorted({str(each[key]) for each in made})) for key in ("date", "commit", "hardware")
    )
    settings, command = cells[0]["settings"], f"python recipes/hybrid.py --model {Path(given.model).name}"
    terms = f"at most {settings['sparse_top_k']} terms, {'with' if settings['expansion'] else 'without'} expansion, "
    terms += "folded" if settings["fold"] else "not folded"
    parts = [
        "# Dense, sparse, BM25, and their fusions",
        f"`{command}`, {dates}, commit {commits}, {machines}. Test splits; {DEPTH:,} hits per index are fused. Sparse "
        f"vectors: {terms}. Differences with a 95 % interval (bootstrap over queries) and the p-value of a paired "
        "two-sided randomisation test. Weights from dev are the best on dev in nDCG@10 among "
        f"{', '.join(f'{weight:g}' for weight in GRID)}, with 1 for dense.",
    ]
    for cell in cells:
        rows = [["system", *METRICS, "against dense", "against BM25"]]
        for system in (*SINGLES, *(system_name(*each) for each in fusions())):
            means = cell["means"][system]
            others = [
                "" if system == other else difference(cell["values"], system, other) for other in ("dense", "bm25")
            ]
            rows.append([system, *(f"{means[metric]:.4f}" for metric in METRICS), *others])
        queries = len(cell["values"]["dense"])
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in cell["bytes"].items())
        weights = "; ".join(
            f"{name} {' : '.join(f'{each:g}' for each in found)}" for name, found in cell["weights"].items()
        )
        parts += [
            f"## {TITLES.get(cell['collection'], cell['collection'])}: {queries:,} queries",
            markdown_table(rows),
            f"Weights from dev: {weights}. Indexes: {sizes}. Seconds: "
            + ", ".join(f"{stage} {value:.1f}" for stage, value in cell["seconds"].items())
            + ".",
        ]
    return "\n\n".join(parts) + "\n"


def difference(values: Mapping[str, Sequence[float]], system: str, other: str) -> str:
    from llara.evaluate import bootstrap_interval, format_p, randomisation_test

    ours, theirs = (np.array(values[name], np.float64) for name in (system, other))
    low, high = bootstrap_interval(ours - theirs, RESAMPLES, 42)
    p_value = randomisation_test(ours, theirs, RESAMPLES, 42)
    return f"{(ours - theirs).mean():+.4f} [{low:+.4f}, {high:+.4f}] {format_p(p_value)}"


# All of it ------------------------------------------------------------------------------------------------------------


def collections(given: argparse.Namespace) -> dict[str, Path]:
    """Returns where each collection lies; the documentation strings are written first."""
    known = {"scifact": DATA / "scifact", "medquad": DATA / "medquad" / "pairs.jsonl.gz"}
    found = {}
    for each in given.collections:
        name, _, path = each.partition("=")
        if name == "docs" and not path:
            from llara.demo import Size, write_data

            path = str(given.output / "data" / "docs")
            write_data(Path(path), Size(pairs=PAIRS, queries=QUERIES, chunks=None, packages=PACKAGES), seed=0)
        if not path and name not in known:
            raise SystemExit(f"--collections: {name} is none of {', '.join((*known, 'docs'))}; give NAME=PATH")
        found[name] = Path(path) if path else known[name]
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "hybrid")
    parser.add_argument("--collections", nargs="+", default=["scifact", "medquad", "docs"])
    parser.add_argument("--sparse-top-k", type=int, default=128)
    parser.add_argument("--expansion", action="store_true")
    parser.add_argument("--fold", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--result", type=Path, help="default: benchmarks/results/DATE-hybrid.md; a .json lies beside it"
    )
    given = parser.parse_args(arguments)
    from llara.files import write_atomic, write_json_atomic
    from llara.retriever import Retriever

    fingerprint = Retriever.load(given.model, device=given.device).identity["model_fingerprint"]
    chosen = {"sparse_top_k": given.sparse_top_k, "expansion": given.expansion, "fold": given.fold}
    settings = {"model": fingerprint, **chosen}
    cells = []
    given.output.mkdir(parents=True, exist_ok=True)
    for name, path in collections(given).items():
        cell = given.output / f"{name}.json"
        found = json.loads(cell.read_text(encoding="utf-8")) if cell.is_file() else {}
        if found.get("settings") != settings:
            write_json_atomic(cell, measure(name, path, given, settings))
        cells.append(json.loads(cell.read_text(encoding="utf-8")))
    result = given.result or ROOT / "benchmarks" / "results" / f"{datetime.date.today().isoformat()}-hybrid.md"
    text = report(cells, given)
    write_atomic(result, text.encode())
    write_json_atomic(result.with_suffix(".json"), cells)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
