"""SIGKILL at any moment, of a run that makes sparse vectors, too.

The run that goes on leaves the bytes of an undisturbed one and encodes nothing twice.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llara.encoding.shards import Vectors
from tests.encoding.helpers import SparseEncoder, corpus_lines, run_sparse, tree, write_corpus

SHARDS, SHARD_SIZE = 4, 10
MOMENTS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = corpus_lines(SHARDS * SHARD_SIZE)
    rows[5], rows[17] = b"{broken", rows[3]
    return write_corpus(tmp_path_factory.mktemp("crash") / "corpus.jsonl", rows)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path) -> dict[str, str]:
    run_sparse(corpus, corpus.parent / "undisturbed")
    return tree(corpus.parent / "undisturbed")


def crash(corpus: Path, folder: Path, events: list[int]) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "tests.encoding.crash", str(corpus), str(folder), *map(str, events)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def finish(corpus: Path, output: Path, finished: list[str]) -> None:
    encoder = SparseEncoder()
    summary = run_sparse(corpus, output, encode=encoder)
    assert summary.reused_shards == len(finished)
    assert len(encoder.calls) == SHARDS - len(finished)


@pytest.fixture(scope="module")
def events(corpus: Path) -> int:
    """The number of events of an undisturbed run."""
    counted, ended = crash(corpus, corpus.parent, [10**9])
    assert ended["status"] == 0
    assert isinstance(counted["events"], int)
    return counted["events"]


def check_kills(corpus: Path, folder: Path, moments: list[int], undisturbed: dict[str, str]) -> set[int]:
    """Kills a run at each moment, each in its own folder, and goes on; returns how many shards were finished."""
    seen: set[int] = set()
    for ended in crash(corpus, folder, moments):
        assert ended["status"] == signal.SIGKILL, ended
        output, finished = folder / str(ended["event"]), ended["finished"]
        assert isinstance(finished, list)
        finish(corpus, output, finished)
        assert tree(output) == undisturbed, f"event {ended['event']}"
        seen.add(len(finished))
    return seen


def test_a_kill_at_seeded_moments_loses_nothing(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str], events: int
) -> None:
    moments = sorted(random.Random(7).sample(range(1, events), MOMENTS))
    assert len(check_kills(corpus, tmp_path, moments, undisturbed)) > 1


def test_a_kill_at_each_step_of_a_publication_loses_nothing(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str], events: int
) -> None:
    # From inside one shard to inside the next: every step of a publication, the sidecar's included.
    moments = list(range(events // 3, events // 3 + events // SHARDS))
    assert len(check_kills(corpus, tmp_path, moments, undisturbed)) == 2


def test_a_kill_at_the_first_and_the_last_steps_loses_nothing(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str], events: int
) -> None:
    moments = [*range(1, 24, 2), *range(events - 40, events, 2)]
    assert {0, SHARDS} <= check_kills(corpus, tmp_path, moments, undisturbed)


def test_a_run_killed_again_and_again_still_arrives(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str], events: int
) -> None:
    # The folder is named after the event, so each round goes on in it; every round lasts for about one shard.
    event, rounds = events // SHARDS + 30, 0
    while crash(corpus, tmp_path, [event])[-1]["status"] != 0:
        rounds += 1
        assert rounds < 3 * SHARDS
    assert rounds > 1
    assert tree(tmp_path / str(event)) == undisturbed
    assert len(Vectors.open(tmp_path / str(event), verify=True)) == SHARDS * SHARD_SIZE - 2
