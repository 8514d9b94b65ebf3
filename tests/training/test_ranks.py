"""Two processes train as one does, share out the batches exactly, stop together, and go on where they were."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llara.training.checkpoint import list_checkpoints
from tests.training.helpers import computed, record, weights

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
KILLED = -9


@pytest.fixture(scope="module")
def made(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ranks.py` left."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.training.ranks", str(base), str(corpus), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    codes = json.loads((folder / "codes.json").read_text())
    failed = {name for name, each in codes.items() if any(each)}
    assert failed == {"killed"}, done.stderr[-4000:]
    assert codes["killed"][1] == KILLED
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_two_processes_have_the_gradients_of_one(made: Path) -> None:
    alone = torch.load(made / "one" / "rank-0.pt", weights_only=True)
    assert alone["asked"] == [0, 1, 2, 3, 4]
    for rank, asked in enumerate(([0, 2, 4], [1, 3])):
        found = torch.load(made / "two" / f"rank-{rank}.pt", weights_only=True)
        assert found["asked"] == asked, "in the last step one process has no batch left"
        assert len(found["gradients"]) == len(alone["gradients"]) == 2
        for left, right in zip(found["gradients"], alone["gradients"], strict=True):
            assert float((left - right).norm() / right.norm()) < 1e-6


@pytest.mark.parametrize(("where", "what"), [("loss", "loss is nan"), ("gradient", "gradient's norm is nan")])
def test_what_is_no_number_in_one_process_stops_both(made: Path, where: str, what: str) -> None:
    folder = made / f"bad-{where}"
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert (found[0]["step"], found[0]["finite"]) == (1, True)
    assert found[0]["said"].startswith(f"the {what} at step 2; nothing was updated with it")
    assert f"the last good checkpoint is {folder / 'work' / 'checkpoint-1'}" in found[0]["said"]
    # Batch 7 of four rows each, or all four batches of the step, those of the first process first.
    rows = [4, 5, 6, 7] if where == "loss" else [16, 17, 18, 19, 0, 1, 2, 3]
    assert ": " + ", ".join(f"row {row}" for row in rows) in found[0]["said"]


def seen(folder: Path, rank: int) -> list[tuple[int, list[list[int]], int]]:
    """The batches that a process trained on: number, token ids of its chunks, passes."""
    lines = (folder / f"rank-{rank}.jsonl").read_text().splitlines()
    return [(number, rows, passes) for number, rows, passes in map(json.loads, lines)]


def test_two_processes_share_out_the_batches_of_one(made: Path) -> None:
    alone = seen(made / "alone", 0)
    both = [seen(made / "together", rank) for rank in (0, 1)]
    assert sorted([*both[0], *both[1]]) == alone
    assert [[number for number, _, _ in mine] for mine in both] == [
        [number for number, _, _ in alone if number % 2 == rank] for rank in (0, 1)
    ]
    chunks = [tuple(row) for _, rows, _ in alone for row in rows]
    assert len(set(chunks)) == len(chunks) == 20, "one pass over the corpus takes every chunk once"
    assert any(not rows for _, rows, _ in alone), "the last step is short of a batch"
    assert max(passes for _, _, passes in alone) > 1, "batches are cut by the token budget"


def test_two_processes_make_the_model_of_one(made: Path) -> None:
    alone, together = weights(made / "alone" / "model"), weights(made / "together" / "model")
    for name in alone:
        # Adam divides by the gradient's size, so rounding shows more in weights than in gradients.
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-4)
    logs = [computed(made / name / "model") for name in ("alone", "together")]
    for left, right in zip(*logs, strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    told = [json.loads((made / "together" / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]


def test_no_thread_of_the_exchange_outlives_a_run(made: Path) -> None:
    for rank in (0, 1):
        during, after = json.loads((made / "together" / f"threads-{rank}.json").read_text())
        assert any("gloo" in name for name in during)
        assert after and not any("gloo" in name for name in after)


def test_a_process_that_is_killed_takes_the_run_with_it_and_the_next_run_goes_on(made: Path) -> None:
    for name in ("model.safetensors", "training.json"):
        assert record(made / "killed" / "model" / name) == record(made / "together" / "model" / name)
    assert computed(made / "killed" / "model") == computed(made / "together" / "model")
    for rank in (0, 1):
        expected, found = (seen(made / name, rank) for name in ("together", "killed"))
        # Killed in the fourth step after a checkpoint at two steps, which the second run went on from.
        assert [entry for entry in found if entry[0] < 4] == expected[:2]
        assert found[-len(expected[2:]) :] == expected[2:]
    assert not (made / "killed" / "model.partial").exists()
    assert list_checkpoints(made / "killed") == []


def test_torchrun_adapts_through_the_command_line(base: Path, corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings: dict[str, Any] = {
        "model": base, "corpus": corpus, "output": tmp_path / "out", "chunk-length": 16, "min-chunk-length": 4,
        "steps": 2, "batch-size": 4, "device": "cpu",
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    job = [*command, "-m", "llara", "adapt", *flags, "--offline", "--json"]
    done = subprocess.run(job, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["steps"] == 2, "one process reports"
    assert done.stderr.count("chunks, ") == 1
    assert json.loads((tmp_path / "out" / "training.json").read_text())["identity"]["processes"] == 2
    again = subprocess.run(
        [sys.executable, "-m", "llara", "adapt", *flags, "--offline"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 2
    assert "processes was 2, is now 1" in again.stderr
