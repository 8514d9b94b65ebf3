"""A fine-tuning step with GradCache beside sentence-transformers' CachedMultipleNegativesRankingLoss, and its memory.

    python benchmarks/finetune_step.py [--queries 64] [--passages 8] [--rounds 5] [--skip-speed]
                                        [--memory-runs 3] [--skip-memory]

Speed: the same model (`mini`), the same token ids of made-up text of mixed lengths, the same temperature, optimizer and
token budget on both sides, each in a process of its own, which take turns. Ours is timed from the text on, theirs from
padded token ids on. Before that, all compute the loss of one batch, which must be the same. Ours runs as plain
GradCache (--graph-budget 0), which is what is compared, and with its default, which keeps some activations.

Memory: a child per size trains one step of 32 and of 2,048 queries with 8 passages of 16 tokens each; what counts is
the peak of its resident memory above that of the loaded model. Needs Linux.

sentence-transformers is no dependency of this project: pip install 'sentence-transformers==6.2.*'. The last line is one
JSON object.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.turns import Side, Step, resident

from llara.hardware import keep_freed_memory

KEPT = contextlib.ExitStack()  # what holds until a process ends
SIDES = ("ours", "ours, default", "theirs")
TARGET = {"speed": 1.3, "memory": 1.3}  # at least, times theirs; at most, times that of few queries
BUDGET, TEMPERATURE, LENGTH = 1024, 0.05, 160
SMALL, LARGE, SHORT = 32, 2048, 16
WORDS = 5_000  # of the made-up language


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(f"w{word}" for word in rng.zipf(1.3, words) % WORDS)


def examples(queries: int, passages: int, *, short: bool) -> Iterator[dict[str, Any]]:
    """Passages of about 10 to 160 tokens, half of them below 60; or of `SHORT` tokens at least, which are then cut."""
    rng = np.random.default_rng(0)

    def words() -> int:
        return SHORT if short else int(np.clip(rng.lognormal(2.9, 0.8), 3, LENGTH))

    for number in range(queries):
        texts = [f"{number} {other} {sentence(rng, words())}" for other in range(passages)]
        query = f"{number} {sentence(rng, SHORT if short else int(rng.integers(3, 12)))}"
        yield {"query": query, "pos": texts[:1], "neg": texts[1:]}


def open_ours(folder: Path, queries: int, passages: int, *, short: bool) -> tuple[Any, Any, Any]:
    """Returns our model, the source of its batches, and their configuration."""
    from llara.config import FinetuneConfig
    from llara.loading import load_model
    from llara.training.contrast import ContrastSource
    from llara.training.examples import ExampleDraw, open_examples
    from llara.training.finetune import freeze_head

    path = folder / "train.jsonl"
    rows = examples(queries, passages, short=short)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = FinetuneConfig(
        model="mini",
        train=(path,),
        output=folder / "out",
        device="cpu",
        batch_size=queries,
        negatives=passages - 1,
        temperature=TEMPERATURE,
        token_budget=BUDGET,
        query_length=SHORT if short else LENGTH,
        passage_length=SHORT if short else LENGTH,
    )
    model = load_model(config, for_training=True, new_template=True)
    model.contract = model.contract.with_lengths(config.query_length, config.passage_length)
    freeze_head(model)
    model.lm.train()
    opened = open_examples(folder / "examples", config)
    draw = ExampleDraw(opened.train, opened.weights, config, model.contract)
    return model, ContrastSource(draw, model, config), config


def our_step(model: Any, source: Any, config: Any, graph_budget: int | None) -> Step:
    """Returns what trains on the batch of a number, and gives its mean loss."""
    from dataclasses import replace

    from llara.training.contrast import ContrastModule

    module = ContrastModule(model, replace(config, graph_budget=graph_budget))
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=1e-5)

    def step(number: int) -> float:
        passes = source.passes(number)
        counts = passes[0]["counts"]
        module.prepare(passes, module)
        total = 0.0
        for batch in passes:
            loss, _ = module(batch, counts)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def their_step(source: Any, passages: int, rounds: int) -> Step:
    """The same for sentence-transformers, on the same token ids, which are made before the clock starts."""
    import llara

    warnings.filterwarnings("ignore")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    words = Transformer(str(Path(llara.__file__).parent / "assets" / "mini"), max_seq_length=LENGTH)
    parts = [words, Pooling(words.get_embedding_dimension(), pooling_mode="lasttoken"), Normalize()]
    model = SentenceTransformer(modules=parts, device="cpu").float().train()
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_num_tokens=BUDGET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    made: dict[int, list[dict[str, torch.Tensor]]] = {}

    def prepare(number: int) -> None:
        rows: dict[int, torch.Tensor] = {}
        for batch in source.passes(number):
            for place, ids, length in zip(batch["rows"].tolist(), batch["ids"], batch["lengths"].tolist(), strict=True):
                rows[place] = ids[:length]
        queries = len(rows) // (passages + 1)
        columns = [range(queries), *(range(queries + each, len(rows), passages) for each in range(passages))]
        made[number] = [padded([rows[place] for place in column]) for column in columns]

    def step(number: int) -> float:
        total = loss([dict(column) for column in made[number]], None)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach())

    for number in range(rounds + 1):
        prepare(number)
    return step


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def open_side(name: str, queries: int, passages: int, rounds: int, folder: Path) -> Step:
    """Returns the step of one side, for a process of its own."""
    (folder / name).mkdir()
    model, source, config = open_ours(folder / name, queries, passages, short=False)
    if name == "theirs":
        return their_step(source, passages, rounds)
    KEPT.enter_context(keep_freed_memory())  # as every training run does on a CPU
    return our_step(model, source, config, 0 if name == "ours" else None)


def speed(queries: int, passages: int, rounds: int, folder: Path) -> dict[str, float]:
    sides = {name: Side(open_side, name, queries, passages, rounds, folder) for name in SIDES}
    losses = {name: side.step(0)[1] for name, side in sides.items()}  # also warms up
    if max(abs(each - losses["theirs"]) for each in losses.values()) > 1e-3 * abs(losses["theirs"]):
        raise SystemExit(f"the sides do not compute the same loss: {losses}")
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name, side in sides.items():
            taken[name].append(side.step(number)[0])
    used = {name: side.close() for name, side in sides.items()}
    print(f"{queries} queries x {passages} passages, {rounds} rounds; loss {losses['theirs']:.4f} on all sides")
    for name, each in taken.items():
        spread = f"{queries / max(each):.2f} to {queries / min(each):.2f}"
        median = queries / statistics.median(each)
        print(f"{name:<14} median {median:6.2f} examples/s, {spread}; {used[name]:,.0f} MiB above the loaded model")
    medians = {name: statistics.median(each) for name, each in taken.items()}
    ratios = {f"{name} / theirs": round(medians["theirs"] / medians[name], 3) for name in SIDES[:2]}
    return {**{f"{name}: examples/s": round(queries / median, 3) for name, median in medians.items()}, **ratios}


def child(queries: int, passages: int, graph_budget: int | None, folder: Path) -> None:
    """Trains one step in this process, and prints what it took above the loaded model."""
    model, source, config = open_ours(folder, queries, passages, short=True)
    step = our_step(model, source, config, graph_budget)
    KEPT.enter_context(keep_freed_memory())
    model.encode(["warm"], "query")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    step(0)
    print(json.dumps({"added": resident("VmHWM") - before}))


def added(queries: int, passages: int, graph_budget: int | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        budget = "default" if graph_budget is None else str(graph_budget)
        command = [sys.executable, __file__, "--child", str(queries), str(passages), budget, folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return float(json.loads(done.stdout.splitlines()[-1])["added"])


def memory(passages: int, runs: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, budget in (("plain", 0), ("default", None)):
        small, large = (
            statistics.median(added(queries, passages, budget) for _ in range(runs)) for queries in (SMALL, LARGE)
        )
        print(f"{name:<14} {SMALL}: {small / 2**20:,.0f} MiB, {LARGE}: {large / 2**20:,.0f} MiB above the loaded model")
        figures |= {
            f"{name}: MiB at {SMALL}": round(small / 2**20, 1),
            f"{name}: MiB at {LARGE}": round(large / 2**20, 1),
        }
        figures[f"{name}: ratio"] = round(large / small, 3)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-runs", type=int, default=3)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        queries, passages, budget, path = given.child
        child(int(queries), int(passages), None if budget == "default" else int(budget), Path(path))
        return
    if given.skip_speed and given.skip_memory:
        parser.error("--skip-speed and --skip-memory leave nothing to measure")
    figures: dict[str, float] = {}
    checks = []
    if not given.skip_speed:
        if importlib.util.find_spec("sentence_transformers") is None:
            sys.exit(
                "sentence-transformers is not installed: pip install 'sentence-transformers==6.2.*', or --skip-speed"
            )
        with tempfile.TemporaryDirectory() as folder:
            figures |= speed(given.queries, given.passages, given.rounds, Path(folder))
        checks.append(figures["ours / theirs"] >= TARGET["speed"])
    if not given.skip_memory:
        figures |= memory(given.passages, given.memory_runs)
        checks.append(max(figures["plain: ratio"], figures["default: ratio"]) <= TARGET["memory"])
    met = all(checks)
    print(json.dumps({"name": "finetune_step", "figures": figures, "target": TARGET, "met": met}))


if __name__ == "__main__":
    main()
