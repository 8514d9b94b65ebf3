"""`kill -9` of an encoder at random moments, and at every step of a shard's publication.

    python benchmarks/crash.py [--moments 100] [--repeats 10] [--seed 7]

Moments: `llara encode` with a tiny random model, over 21 shards with sparse vectors, gets SIGKILL from outside at
seeded moments of its writing. Steps: the writer, with an encoder that needs no model, kills itself before and after
every call that reserves space, syncs, renames or removes, in each of `--repeats` of 21 shards. The command is then run
again to its end. Every file must have the SHA-256 that an undisturbed run gives it, and the files of the shards that
were finished must be the same ones, unchanged. The last line is one JSON object.
"""

import argparse
import itertools
import json
import random
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

from common.checkout import scratch
from common.tiny_job import SHARDS, encode, prepare, undisturbed

from tests.children import Child, preload, run
from tests.encoding.crash import ENCODE, Finished, crash
from tests.encoding.helpers import corpus_lines, run_sparse, tree, write_corpus

ROWS = 3  # per shard, where steps are counted
PATIENCE = 120.0  # seconds until a child must have begun to write


class Tally:
    """Counts kills, and says at once what was wrong after one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kills = self.finished = self.faults = 0

    def add(self, where: str, finished: Finished, fault: str) -> None:
        self.kills += 1
        self.finished += len(finished.shards)
        if fault:
            self.faults += 1
            print(f"{where}: {fault}")

    def show(self) -> None:
        what = f"{self.finished:,} shards were finished by then, and kept"
        print(f"{self.name}: {self.kills:,} kills; {what}; {self.faults} faults", flush=True)


def wait_for(path: Path, child: Child) -> None:
    """Waits until a child has written a file, or has ended."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() and not child.ended():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.001)


def seconds_of_writing(root: Path, name: str) -> float:
    folder = root / name
    folder.mkdir()
    child = Child(encode("vectors"), folder)
    wait_for(folder / "vectors" / "manifest.json", child)
    began = time.monotonic()
    assert child.wait().status == 0
    return time.monotonic() - began


def kill_at_moments(root: Path, count: int, seed: int) -> Tally:
    """Kills `llara encode` `count` times; a run that ended before its moment is repeated at another."""
    prepare(root)
    expected = undisturbed(root)
    span = statistics.median(seconds_of_writing(root, f"timed{number}") for number in range(3))
    rng, tally, too_late = random.Random(seed), Tally("moments"), 0
    while tally.kills < count:
        folder = root / f"run{tally.kills + too_late}"
        folder.mkdir()
        child = Child(encode("vectors"), folder)
        wait_for(folder / "vectors" / "manifest.json", child)
        time.sleep(rng.uniform(0, span))
        child.kill()
        if child.wait().status == -signal.SIGKILL:
            finished = Finished(folder / "vectors")
            ended = run(encode("vectors"), folder)
            reused = json.loads(ended.out)["reused_shards"] if ended.status == 0 else -1
            tally.add(folder.name, finished, finished.fault(reused, expected) if reused >= 0 else ended.err)
        else:
            too_late += 1
        shutil.rmtree(folder)
    print(f"writing took {span:.2f} s undisturbed; {too_late} runs ended before they were killed")
    tally.show()
    return tally


def publication(names: list[str]) -> tuple[list[int], int]:
    """Returns after which event each shard's publication begins, and how many events one has."""
    begins = [number for number, name in enumerate(names, 1) if name == f"before {ENCODE}"]
    lengths = {later - earlier for earlier, later in itertools.pairwise(begins)}
    assert len(begins) == SHARDS and len(lengths) == 1, "every shard is published in the same steps"
    return begins, lengths.pop()


def kill_at_steps(root: Path, repeats: int, seed: int) -> tuple[Tally, int]:
    """Kills the writer at every step of the publication of `repeats` shards, each in a folder of its own."""
    root.mkdir()
    corpus = write_corpus(root / "corpus.jsonl", corpus_lines(SHARDS * ROWS))
    counted = crash(corpus, root / "undisturbed", 10**9, ROWS)
    expected = tree(root / "undisturbed")
    begins, steps = publication(json.loads(counted.out))
    rng, tally = random.Random(seed), Tally("steps")
    for step in range(steps):
        # The first shard among them, and not the last, whose end is followed by other steps.
        for shard in [0, *rng.sample(range(1, SHARDS - 1), repeats - 1)]:
            output = root / f"step{step}-shard{shard}"
            ended = crash(corpus, output, begins[shard] + step, ROWS)
            finished = Finished(output)
            assert ended.status == -signal.SIGKILL, ended.err
            assert len(finished.shards) in (shard, shard + 1), "it was killed in another shard"
            again = run(lambda output=output: print(run_sparse(corpus, output, ROWS).reused_shards))
            fault = finished.fault(int(again.out), expected) if again.status == 0 else again.err
            tally.add(output.name, finished, fault)
            shutil.rmtree(output)
    print(f"{steps} steps in the publication of a shard, {repeats} shards each")
    tally.show()
    return tally, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        by_step, steps = kill_at_steps(Path(folder) / "steps", options.repeats, options.seed)
        (Path(folder) / "moments").mkdir()
        by_moment = kill_at_moments(Path(folder) / "moments", options.moments, options.seed)
    figures = {"shards": SHARDS, "steps": steps}
    for tally in (by_moment, by_step):
        figures |= {f"{tally.name}_killed": tally.kills, f"{tally.name}_faults": tally.faults}
        figures[f"{tally.name}_shards_kept"] = tally.finished
    target = {"moments_killed": 100, "step_repeats": 10, "faults": 0}
    met = by_moment.kills >= 100 and by_step.kills >= 10 * steps and not by_moment.faults + by_step.faults
    print(json.dumps({"name": "crash", "figures": figures, "target": target, "met": met}))


if __name__ == "__main__":
    main()
