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
from tests.encoding.crash import Finished
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


def finish(corpus: Path, output: Path, undisturbed: dict[str, str]) -> int:
    """Goes on with a run that was killed; returns how many shards it had finished."""
    finished, encoder = Finished(output), SparseEncoder()
    summary = run_sparse(corpus, output, encode=encoder)
    assert not finished.fault(summary.reused_shards, undisturbed), output.name
    assert len(encoder.calls) == SHARDS - len(finished.shards)
    return len(finished.shards)


@pytest.fixture(scope="module")
def events(corpus: Path) -> int:
    """The number of events of an undisturbed run."""
    (ended,) = crash(corpus, corpus.parent, [10**9])
    assert ended["status"] == 0
    assert isinstance(ended["events"], int)
    return ended["events"]


def check_kills(corpus: Path, folder: Path, moments: list[int], undisturbed: dict[str, str]) -> set[int]:
    """Kills a run at each moment, each in its own folder, and goes on; returns how many shards were finished."""
    ended = crash(corpus, folder, moments)
    assert {each["status"] for each in ended} == {-signal.SIGKILL}, ended
    return {finish(corpus, folder / str(moment), undisturbed) for moment in moments}


def test_a_shard_that_is_made_again_or_differs_is_told(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    run_sparse(corpus, tmp_path)
    finished = Finished(tmp_path)
    assert finished.fault(SHARDS, undisturbed) == ""
    assert finished.fault(SHARDS - 1, undisturbed) == f"{SHARDS} shards were finished, {SHARDS - 1} were found so"
    assert "other bytes than an undisturbed run's: config.toml" in finished.fault(
        SHARDS, undisturbed | {"config.toml": ""}
    )
    (tmp_path / "shard-00001.json").unlink()
    run_sparse(corpus, tmp_path)
    assert finished.fault(SHARDS, undisturbed) == "a finished shard was made again"


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
