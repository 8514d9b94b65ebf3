"""Does adaptation help, and which part of it? Arms that differ in adaptation alone, then the same fine-tuning.

    python recipes/ablation.py run     [--config recipes/ablation.toml] [--arms NAME...] [--seeds N...] [--jobs N]
                                       [--keep]
    python recipes/ablation.py report  [--config recipes/ablation.toml]

A cell is one arm with one seed: adapt, finetune, encode, search, measure, on three collections. A finished cell is one
JSON file in `benchmarks/results/<name of the configuration>/`; `run` skips what is there, and a cell that was stopped
goes on where it was. Its models and vectors are deleted at its end; `--keep` keeps them, and makes the models of
finished cells again. Cells run side by side, one thread each: small matrix products gain little from a second thread.
LLARA_DATA names the data folder.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measured import ROOT, commit
from scifact_report import hardware

if TYPE_CHECKING:
    from llara.config import AdaptConfig, FinetuneConfig

DATA = Path(os.environ.get("LLARA_DATA", ROOT.parent / "shared" / "data"))
# Packages that requirements.lock pins, so that the strings are the same wherever that is installed.
PACKAGES = ("networkx", "numpy", "scipy", "sympy", "torch")
PAIRS, QUERIES = 3000, 1000  # documentation strings: training pairs, queries of dev and of test
METRICS = ("nDCG@10", "R@100")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A configuration file: what all arms share, what each changes, and where its cells go."""

    name: str
    split: str
    seeds: list[int]
    baselines: list[str]
    data: dict[str, int]
    adapt: dict[str, Any]
    finetune: dict[str, Any]
    encode: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    compared: list[str] = dataclasses.field(default_factory=list)
    """Arms with which the tables compare the others, beside the baselines."""

    @property
    def work(self) -> Path:
        return ROOT / "runs" / self.name

    @property
    def results(self) -> Path:
        return ROOT / "benchmarks" / "results" / self.name

    def documents(self, arm: str) -> dict[str, int]:
        """Returns of which source how many documents an arm adapts on."""
        counts = {**self.data, **self.arms[arm].get("documents", {})}
        return {key: count for key, count in counts.items() if key.endswith("_documents")}

    def result(self, arm: str, seed: int) -> Path:
        return self.results / f"{arm}-{seed}.json"


def read_plan(path: Path) -> Plan:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    return Plan(name=path.stem.replace("_", "-"), **values)


# Data -----------------------------------------------------------------------------------------------------------------


def prepare(plan: Plan) -> Path:
    """Writes the text to adapt on, the training pairs, and the documentation strings; once."""
    folder = plan.work / "data"
    if not (folder / "data.json").is_file():
        _write_shared(folder, plan)
    for arm, changes in plan.arms.items():
        if "documents" in changes and not (text := folder / f"text-{arm}.jsonl").is_file():
            _write(text, _text(folder, plan.documents(arm)))
    return folder


def _write_shared(folder: Path, plan: Plan) -> None:
    """Writes what all arms share, and last the digests of these files."""
    from llara.demo import Size, write_data
    from llara.files import write_json_atomic

    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder / "docs", Size(pairs=PAIRS, queries=QUERIES, chunks=None, packages=PACKAGES), seed=0)
    _write(folder / "text.jsonl", _text(folder, plan.data))
    _write(folder / "train.jsonl", _pairs(folder, plan.data))
    files = [folder / "text.jsonl", folder / "train.jsonl", folder / "docs" / "corpus.jsonl"]
    if "medquad_distractors" in plan.data:
        _write_part(folder / "medquad", plan.split, plan.data["medquad_distractors"])
        files.append(folder / "medquad" / "corpus.jsonl")
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    write_json_atomic(folder / "data.json", digests)


def collections(folder: Path) -> dict[str, Path]:
    part = folder / "medquad"
    medquad = part if part.is_dir() else DATA / "medquad" / "pairs.jsonl.gz"
    return {"scifact": DATA / "scifact", "medquad": medquad, "docs": folder / "docs"}


def _write_part(folder: Path, split: str, distractors: int) -> None:
    """Writes MedQuAD with fewer documents as a BEIR folder: those that the split judges, and a sample of the others."""
    from llara.data import open_collection

    whole = open_collection(DATA / "medquad" / "pairs.jsonl.gz")
    assert whole is not None
    qrels = whole.qrels(split)
    judged = {qrel.document_id for qrel in qrels}
    documents = list(whole.documents())
    others = [document for document in documents if document.id not in judged]
    kept = judged | {others[number].id for number in _sample(len(others), distractors)}
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    rows = [document for document in documents if document.id in kept]
    _write(folder / "corpus.jsonl", ({"_id": row.id, "title": row.title, "text": row.text} for row in rows))
    _write(folder / "queries.jsonl", ({"_id": query.id, "text": query.text} for query in whole.queries(split)))
    lines = [f"{qrel.query_id}\t{qrel.document_id}\t{qrel.relevance}\n" for qrel in qrels]
    (folder / "qrels" / f"{split}.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *lines]), encoding="utf-8")


def _text(folder: Path, data: dict[str, int]) -> Iterator[dict[str, str]]:
    """Yields documents of each source, as many as the configuration says; of documentation strings, the train split.

    Sources are plain text: of MedQuAD the answers without their questions, of SciFact the abstracts without the claims.
    """
    sources = {
        "wiki": DATA / "wiki" / "articles.jsonl.gz",
        "medquad": DATA / "medquad" / "pairs.jsonl.gz",
        "scifact": DATA / "scifact",
        "docs": folder / "docs" / "text.jsonl",
    }
    from llara.data import read_documents

    for name, path in sources.items():
        documents = list(read_documents([path]))
        for number in _sample(len(documents), data[f"{name}_documents"]):
            document = documents[number]
            yield {"_id": f"{name}-{document.id}", "title": document.title, "text": document.text}


def _pairs(folder: Path, data: dict[str, int]) -> Iterator[dict[str, Any]]:
    from llara.data import read_examples

    sets = {**collections(folder), "medquad": DATA / "medquad" / "pairs.jsonl.gz"}
    for name, path in sets.items():
        examples = read_examples([path], "train")
        for number in _sample(len(examples), data[f"{name}_pairs"]):
            passages = [{"title": passage.title, "text": passage.text} for passage in examples[number].positives]
            yield {"query": examples[number].query, "pos": passages}


def _sample(count: int, wanted: int) -> Iterable[int]:
    """Returns `wanted` of `count` row numbers, all of them as often as they fit, the rest drawn with a fixed seed."""
    times, rest = divmod(wanted, count)
    drawn = np.random.default_rng(0).permutation(count)[:rest]
    return [*list(range(count)) * times, *sorted(drawn.tolist())]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    staged = path.with_name(f".tmp-{path.name}")
    with staged.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    staged.replace(path)


# One cell -------------------------------------------------------------------------------------------------------------


def configs(plan: Plan, arm: str, seed: int) -> "tuple[AdaptConfig | None, FinetuneConfig]":
    """Returns the two training stages of a cell; without adaptation there is one."""
    from llara.config import AdaptConfig, FinetuneConfig

    folder, data = plan.work / f"{arm}-{seed}", plan.work / "data"
    common: dict[str, Any] = {"device": "cpu", "seed": seed, "save_every": 50, "keep": 1, "offline": True}
    changes = dict(plan.arms[arm])
    text = data / ("text.jsonl" if changes.pop("documents", None) is None else f"text-{arm}.jsonl")
    adapt = None
    if changes.pop("adapt", True):
        settings = {**common, **plan.adapt, **changes}
        adapt = AdaptConfig(model="mini", corpus=(text,), output=folder / "base", **settings)
    base = "mini" if adapt is None else str(adapt.output)
    settings = {**common, **plan.finetune, "template": changes.get("template", "paper")}
    return adapt, FinetuneConfig(model=base, train=(data / "train.jsonl",), output=folder / "model", **settings)


def run_cell(plan: Plan, arm: str, seed: int, *, keep: bool) -> None:
    from llara.config import EncodeConfig, to_plain
    from llara.encoding.encode import encode
    from llara.files import write_json_atomic
    from llara.training.adapt import adapt
    from llara.training.finetune import finetune

    folder, data = plan.work / f"{arm}-{seed}", plan.work / "data"
    adapt_config, finetune_config = configs(plan, arm, seed)
    seconds: dict[str, float] = {}
    log: dict[str, float] = {}
    if adapt_config is not None:
        began = time.monotonic()
        log = dict(adapt(adapt_config).log)
        seconds["adapt"] = time.monotonic() - began
    began = time.monotonic()
    finetune(finetune_config)
    seconds["finetune"] = time.monotonic() - began
    if plan.result(arm, seed).is_file():  # only the models were missing
        return
    measured: dict[str, Any] = {}
    for name, path in collections(data).items():
        began = time.monotonic()
        model, vectors = str(finetune_config.output), folder / name / "vectors"
        encode(EncodeConfig(model=model, device="cpu", corpus=(path,), output=vectors, **plan.encode))
        measured[name] = measure(folder / name, path, plan.split)
        seconds[f"measure {name}"] = time.monotonic() - began
    settings = {
        "adapt": adapt_config and {**portable(to_plain(adapt_config)), "documents": plan.documents(arm)},
        "finetune": portable(to_plain(finetune_config)),
    }
    made = {"commit": commit(), "date": datetime.date.today().isoformat(), "hardware": hardware()}
    plan.results.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        plan.result(arm, seed),
        {
            **{"arm": arm, "seed": seed, "split": plan.split, **made, "settings": settings, "log": log},
            "data": json.loads((data / "data.json").read_text(encoding="utf-8")),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "collections": measured,
        },
    )
    if not keep:
        shutil.rmtree(folder)


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings without the paths of this machine."""
    return {key: value for key, value in settings.items() if key not in ("model", "corpus", "train", "output")}


def measure(folder: Path, corpus: Path, split: str) -> dict[str, Any]:
    from llara.config import EvaluateConfig, IndexConfig, SearchConfig
    from llara.evaluate import evaluate
    from llara.index.build import build_index
    from llara.search import search

    build_index(IndexConfig(vectors=folder / "vectors", output=folder / "index"))
    run = folder / "run.trec"
    search(SearchConfig(index=folder / "index", device="cpu", queries=corpus, split=split, output=run, top_k=100))
    found = evaluate(EvaluateConfig(run=(run,), qrels=corpus, split=split, metrics=METRICS))
    name = found.runs[0]
    values = [round(value, 4) for value in found.values[name][METRICS[0]]]
    return {"means": {metric: round(found.means[name][metric], 5) for metric in METRICS}, METRICS[0]: values}


# All cells ------------------------------------------------------------------------------------------------------------


def is_done(plan: Plan, arm: str, seed: int, *, keep: bool) -> bool:
    """Tells whether a cell has its result, and, where they are to be kept, its models."""
    return plan.result(arm, seed).is_file() and (not keep or (plan.work / f"{arm}-{seed}" / "model").is_dir())


def run_all(plan: Plan, config: Path, arms: list[str], seeds: list[int], jobs: int, *, keep: bool) -> int:
    """Runs what is missing, `jobs` cells at a time; returns how many failed."""
    prepare(plan)
    waiting = [(arm, seed) for seed in seeds for arm in arms if not is_done(plan, arm, seed, keep=keep)]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    failed = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while waiting or running:
        while waiting and len(running) < jobs:
            arm, seed = waiting.pop(0)
            command = [sys.executable, __file__, "cell", "--config", str(config), "--arms", arm, "--seeds", str(seed)]
            command += ["--keep"] if keep else []
            plan.work.mkdir(parents=True, exist_ok=True)
            with (plan.work / f"{arm}-{seed}.log").open("ab") as log:
                running[arm, seed] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            print(f"{datetime.datetime.now():%H:%M} {arm}, seed {seed}: started", flush=True)
        time.sleep(1)
        for cell, process in list(running.items()):
            if process.poll() is not None:
                del running[cell]
                failed += process.returncode != 0
                print(
                    f"{datetime.datetime.now():%H:%M} {cell[0]}, seed {cell[1]}: exit {process.returncode}", flush=True
                )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("run", "cell", "report"))
    parser.add_argument("--config", type=Path, default=ROOT / "recipes" / "ablation.toml")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    plan = read_plan(given.config)
    arms, seeds = given.arms or list(plan.arms), given.seeds or plan.seeds
    if unknown := sorted(set(arms) - set(plan.arms)):
        parser.error(f"no arm is called {', '.join(unknown)}; there are {', '.join(plan.arms)}")
    if given.job == "cell":
        run_cell(plan, arms[0], seeds[0], keep=given.keep)
        return 0
    if given.job == "run":
        return int(run_all(plan, given.config, arms, seeds, given.jobs, keep=given.keep) > 0)
    from ablation_report import write_report

    write_report(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
