"""Who encodes: what the driver alone can read and publish, and one process beside several.

    python benchmarks/engines.py [--rows 100000] [--passages 200] [--rounds 3]

Driver: `encode` of `--rows` passages of about 100 words with a stand-in for the model, in seconds of processor time, so
that what else the machine does counts little: reading, sifting, compressing, checksums, publishing.

Engines: the same shards of passages through `mini`, models loaded beforehand, in turns: one process on all cores
without tokenising ahead, the same with it, and one process per core. The numbers must be equal where the threads are.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common.checkout  # noqa: F401 - the next import needs it
import numpy as np
from common.stand_in import Quick

import llara.retriever
from llara.config import EncodeConfig
from llara.encoding.encode import encode
from llara.encoding.encoder import open_encoder
from llara.encoding.engine import Engine, Inline, Job
from llara.encoding.engines import Local
from llara.encoding.processes import Processes
from llara.hardware import cores
from llara.progress import hushed
from llara.records import Document

SHARD = 25
LEAST = 10_000  # passages per second of the driver's processor time
WORDS = ("the", "of", "and", "in", "to", "was", "is", "for", "as", "on", "by", "with", "he", "that", "at", "from", "it")


def passage(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(10)) * rng.randrange(3) for _ in range(100))


def driver(rows: int, rounds: int) -> list[float]:
    """Returns passages per second of processor time, of each round."""
    real, found, rng = llara.retriever.Retriever, [], random.Random(7)
    with tempfile.TemporaryDirectory() as made:
        corpus = Path(made) / "corpus.jsonl"
        with corpus.open("w") as file:
            for number in range(rows):
                fields = {"_id": f"p{number}", "title": f"Title {number}", "text": passage(rng)}
                file.write(json.dumps(fields) + "\n")
        print(f"driver: {rows:,} passages, {corpus.stat().st_size / rows:.0f} bytes each")
        llara.retriever.Retriever = Quick()  # type: ignore[assignment, misc]
        for number in range(rounds):
            config = EncodeConfig(model="mini", corpus=(corpus,), output=Path(made) / str(number), device="cpu")
            began = time.process_time()
            with hushed():
                encode(config)
            found.append(rows / (time.process_time() - began))
        llara.retriever.Retriever = real  # type: ignore[misc]
    return found


def shards(passages: int) -> list[Job]:
    rng = random.Random(11)
    documents = [Document(str(number), passage(rng)) for number in range(passages)]
    return [Job(str(start), documents[start : start + SHARD]) for start in range(0, passages, SHARD)]


def drain(engine: Engine, jobs: list[Job]) -> tuple[float, dict[str, Any]]:
    """Returns the seconds that an engine takes, and what it gives."""
    began = time.perf_counter()
    found = dict(engine.encode(iter(jobs), lambda count: None))
    return time.perf_counter() - began, found


def engines(passages: int, rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Returns the seconds of each engine's rounds, and whether the numbers of one thread are equal everywhere."""
    jobs, count = shards(passages), cores()
    config = EncodeConfig(model="mini", corpus=(Path("none"),), output=Path("none"), device="cpu", worker_threads=count)
    taken: dict[str, list[float]] = {}
    with hushed(), Local(config) as local, Processes(config, count, []) as several:
        several._places = [place._replace(threads=1) for place in several._places]
        local.facts()
        several.facts()
        while len(several._ready) < count:  # all have loaded the model before anything is timed
            for number, message in several._messages():
                several._take(number, message)
        plain = Inline(open_encoder(config, count))
        sides: dict[str, Engine] = {
            "one process": plain,
            "one process, tokenising ahead": local,
            f"{count} processes": several,
        }
        found: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            for name, engine in sides.items():
                seconds, found[name] = drain(engine, jobs)
                taken.setdefault(name, []).append(seconds)
        alone = drain(Inline(open_encoder(config, 1)), jobs)[1]
    one, ahead, more = found.values()
    equal = all(np.array_equal(one[name], ahead[name]) and np.array_equal(more[name], alone[name]) for name in one)
    return taken, equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--passages", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rates = driver(given.rows, given.rounds)
    rate = statistics.median(rates)
    print(f"  {rate:,.0f} passages per second of processor time (from {min(rates):,.0f} to {max(rates):,.0f})")
    taken, equal = engines(given.passages, given.rounds)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    print(f"\n{given.passages:,} passages through mini, {cores()} cores")
    print("| side | median s | fastest | slowest | passages/s |")
    print("|---|---:|---:|---:|---:|")
    for name, each in taken.items():
        speed = f"{given.passages / medians[name]:.0f}"
        print(f"| {name} | {medians[name]:.2f} | {min(each):.2f} | {max(each):.2f} | {speed} |")
    print(f"numbers of as many threads equal: {equal}")
    figures = {"driver, passages per CPU second": round(rate)}
    figures |= {f"one process / {name}": round(medians["one process"] / value, 3) for name, value in medians.items()}
    result = {"name": "engines", "figures": figures | {"equal": equal}}
    target = f"a driver of {LEAST:,} passages per CPU second; equal numbers"
    print(json.dumps(result | {"target": target, "met": equal and rate >= LEAST}))


if __name__ == "__main__":
    main()
