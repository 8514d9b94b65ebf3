"""The whole job on an embedded default: documentation strings of the installed packages, and the model in the package.

Query = the first sentence of a documentation string; document = the rest of it. Three arms are fine-tuned alike: the
base model as it is, after plain language-model training, and after EBAE + EBAR, both on the same text. The second one
tells what more training alone is worth. BM25 stands beside them.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llara.config import (
    AdaptConfig,
    DemoConfig,
    EncodeConfig,
    EvaluateConfig,
    FinetuneConfig,
    IndexConfig,
    SearchConfig,
)
from llara.data.docstrings import DocstringRow, docstring_collection, read_docstrings
from llara.encoding.encode import encode
from llara.evaluate import Evaluation, evaluate
from llara.files import claim_output, json_bytes, publish_folder, save_config
from llara.index.build import build_index
from llara.invocation import shell_line
from llara.progress import Progress, note
from llara.search import search
from llara.training.adapt import adapt
from llara.training.finetune import finetune

METRICS = ("nDCG@10", "R@100", "RR@10")
ARMS = ("finetuned", "lm+finetuned", "adapted+finetuned")
EXAMPLE = "read a file line by line"
# Learning rates and temperature were chosen on dev splits (LOG.md).
ADAPT: dict[str, Any] = {"chunk_length": 64, "batch_size": 16, "accumulation": 2, "learning_rate": 1e-3}
FINETUNE: dict[str, Any] = {
    "batch_size": 48,
    "learning_rate": 1e-3,
    "temperature": 0.02,
    "query_length": 32,
    "passage_length": 96,
}


@dataclass(frozen=True)
class Size:
    """How much of the documentation strings a run takes; None means all."""

    pairs: int | None
    queries: int | None
    chunks: int | None
    packages: tuple[str, ...] | None = None


SIZES = {
    # Three arms in less than ten minutes on two cores.
    "default": Size(pairs=2700, queries=400, chunks=7000),
    "fast": Size(pairs=480, queries=200, chunks=512, packages=("numpy", "scipy", "email", "logging", "asyncio")),
    "full": Size(pairs=None, queries=None, chunks=None),
}


@dataclass(frozen=True)
class DemoResult:
    """What the demo made: its table, and where everything lies."""

    output: Path
    evaluation: Evaluation
    documents: int
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gigabytes: float = 0.0

    @property
    def next_command(self) -> str:
        """The command that searches what the demo built."""
        return shell_line(["search", EXAMPLE, "--index", self.output / ARMS[-1] / "index"])

    @property
    def verdict(self) -> str:
        """What the table says of adaptation at this size, in one sentence."""
        found = next(c for c in self.evaluation.comparisons if (c.run, c.metric) == (ARMS[-1], METRICS[0]))
        if found.p_value >= 0.05:
            effect = "makes no difference that these queries can show"
        else:
            effect = "helps" if found.difference > 0 else "hurts"
        return (
            f"At this size adaptation {effect}: {METRICS[0]} {found.difference:+.4f}, "
            f"95 % interval {found.low:+.4f} to {found.high:+.4f}."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        return {
            "output": str(self.output),
            "documents": self.documents,
            "evaluation": self.evaluation.to_json(),
            "seconds": self.seconds,
            "peak_gigabytes": self.peak_gigabytes,
            "command": self.next_command,
        }

    def to_text(self) -> str:
        """Returns the table, the time it took, and where things lie."""
        total = sum(self.seconds.values())
        return (
            f"{self.evaluation.to_text()}\n\n{self.verdict}\n"
            f"{self.documents:,} documents; this run took {total / 60:.1f} minutes and "
            f"{self.peak_gigabytes:.1f} GB of memory at its peak\neverything lies in {self.output}"
        )


def demo(config: DemoConfig) -> DemoResult:
    """Runs the whole job: data, adapt, finetune, encode, index, search, evaluate. A second run resumes.

    Raises:
        StorageError: The output folder belongs to something else, or the disk is full.
    """
    mode: Literal["default", "fast", "full"] = "fast" if config.fast else "full" if config.full else "default"
    output = config.output or Path("llara-demo" if mode == "default" else f"llara-demo-{mode}")
    claim_output(output, {"mode": mode, "seed": config.seed}, "demo")
    save_config(output, config)
    seconds: dict[str, float] = {}
    data = output / "data"
    with _stage("documentation strings", seconds):
        documents = write_data(data, SIZES[mode], config.seed)
    with _stage("BM25", seconds):
        _bm25(output, data)
    for arm in ARMS:
        _arm(arm, output, config.seed, SIZES[mode], seconds)
    with _stage("evaluate", seconds):
        runs = tuple(output / arm / f"{arm}.trec" for arm in (*ARMS, "bm25"))
        # The baseline of every difference is the model without adaptation.
        table = evaluate(EvaluateConfig(run=runs, qrels=data, metrics=METRICS, output=output / "evaluation.json"))
    return DemoResult(output, table, documents, seconds, peak_gigabytes())


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    note(f"\n{name}")
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 2)


def peak_gigabytes() -> float:
    """Returns the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def write_data(folder: Path, size: Size, seed: int) -> int:
    """Writes a seeded sample as a BEIR folder, and the train part as plain text; returns the number of documents.

    The text to adapt on is that of train modules only, so no query or document of the test split is in it.
    """
    summary = folder / "summary.json"
    if summary.is_file():
        return int(json.loads(summary.read_text(encoding="utf-8"))["documents"])
    with Progress("read documentation strings", None, "files") as progress:
        rows = read_docstrings(size.packages, lambda done, total: progress.advance())
    splits = _sample(rows, size, seed)
    staged = folder.with_name(f".tmp-{folder.name}")
    if staged.exists():
        shutil.rmtree(staged)
    (staged / "qrels").mkdir(parents=True)
    kept = [row for part in splits.values() for row in part]
    _write_lines(staged / "corpus.jsonl", ({"_id": row.id, "title": "", "text": row.body} for row in kept))
    _write_lines(staged / "queries.jsonl", ({"_id": f"q-{row.id}", "text": row.summary} for row in kept))
    text = ({"_id": row.id, "text": f"{row.summary}\n{row.body}"} for row in splits["train"])
    _write_lines(staged / "text.jsonl", text)
    for split, part in splits.items():
        lines = ["query-id\tcorpus-id\tscore\n", *(f"q-{row.id}\t{row.id}\t1\n" for row in part)]
        (staged / "qrels" / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    counts = {split: len(part) for split, part in splits.items()}
    (staged / "summary.json").write_bytes(json_bytes({"documents": len(kept), "splits": counts}))
    publish_folder(staged, folder)
    return len(kept)


def _sample(rows: Sequence[DocstringRow], size: Size, seed: int) -> dict[str, list[DocstringRow]]:
    collection = docstring_collection(rows)
    by_id = {row.id: row for row in rows}
    limits = {"train": size.pairs, "dev": size.queries, "test": size.queries}
    splits = {}
    for number, (split, limit) in enumerate(limits.items()):
        ids = sorted({qrel.document_id for qrel in collection.qrels(split)})
        if limit is not None and limit < len(ids):
            picked = np.random.default_rng([seed, number]).permutation(len(ids))[:limit]
            ids = [ids[i] for i in sorted(picked)]
        splits[split] = [by_id[name] for name in ids]
    return splits


def _write_lines(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _bm25(output: Path, data: Path) -> None:
    folder = output / "bm25"
    build_index(IndexConfig(type="bm25", corpus=(data,), output=folder / "index"))
    search(SearchConfig(index=folder / "index", queries=data, split="test", output=folder / "bm25.trec"))


def _arm(arm: str, output: Path, seed: int, size: Size, seconds: dict[str, float]) -> None:
    """Trains and measures one system; whatever an earlier run finished is found and left as it is."""
    folder, data, model = output / arm, output / "data", "mini"
    common: dict[str, Any] = {"device": "cpu", "seed": seed, "save_every": 25, "keep": 1, "offline": True}
    if arm != "finetuned":
        model = str(folder / "base")
        with _stage(f"{arm}: adapt", seconds):
            adapt(
                AdaptConfig(
                    **common,
                    **ADAPT,
                    model="mini",
                    corpus=(data / "text.jsonl",),
                    output=Path(model),
                    max_chunks=size.chunks,
                    objective="lm" if arm.startswith("lm") else "ebae+ebar",
                )
            )
    with _stage(f"{arm}: finetune", seconds):
        finetune(FinetuneConfig(**common, **FINETUNE, model=model, train=(data,), output=folder / "model"))
    with _stage(f"{arm}: encode, index, search", seconds):
        trained = str(folder / "model")
        encode(EncodeConfig(model=trained, device="cpu", corpus=(data,), output=folder / "vectors", shard_size=1000))
        build_index(IndexConfig(vectors=folder / "vectors", output=folder / "index"))
        search(
            SearchConfig(
                model=trained,
                device="cpu",
                index=folder / "index",
                queries=data,
                split="test",
                output=folder / f"{arm}.trec",
            )
        )
