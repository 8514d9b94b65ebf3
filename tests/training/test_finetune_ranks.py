"""Two processes fine-tune as one does with both batches, each with all weights or with half of every one (FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.examples import row
from tests.training.helpers import WORDS, computed, record, sentence, write_lines

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `finetune_ranks.py` left. Examples have different numbers of negatives, and some share a positive."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        positive = "shared by four" if i % 6 == 0 else f"{sentence(rng, 8)} {i}"
        negatives = [f"{sentence(rng, 4 + i)} {i}" for _ in range(i % 4)]
        scores = {"pos_scores": [2.0], "neg_scores": [float(j) for j in range(i % 4)]}
        rows.append(row(f"{WORDS[i % len(WORDS)]} {i}", [positive], negatives, **scores))
    train = write_lines(folder / "train.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.finetune_ranks", str(base), str(train), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    codes = json.loads((folder / "codes.json").read_text())
    assert codes.pop("killed")[1] == -9
    assert not any(code for each in codes.values() for code in each), (codes, done.stderr[-6000:])
    return folder


@pytest.mark.parametrize("name", ["together", "sharded"])
def test_losses_and_gradients_are_those_of_one_process_with_both_batches(runs: Path, name: str) -> None:
    alone, together = (computed(runs / each / "model") for each in ("alone", name))
    assert len(alone) == len(together) == 4
    for left, right in zip(alone, together, strict=True):
        for value in ("loss", "loss_contrast", "loss_kl", "grad_norm"):
            assert right[value] == pytest.approx(left[value], rel=1e-3), (value, left["step"])
    for value in ("dev_loss", "dev_ndcg", "dev_mrr"):
        assert together[1][value] == pytest.approx(alone[1][value], rel=1e-2)


@pytest.mark.parametrize("name", ["together", "sharded"])
def test_the_weights_are_those_of_one_process(runs: Path, base: Path, name: str) -> None:
    before = load_file(base / "model.safetensors")
    alone, together = (load_file(runs / each / "model" / "model.safetensors") for each in ("alone", name))
    moved = torch.cat([(alone[name] - before[name]).flatten() for name in before])
    apart = torch.cat([(alone[name] - together[name]).flatten() for name in before])
    assert float(moved.norm()) > 0
    assert float(apart.norm() / moved.norm()) < 0.05  # Adam divides by the gradient's size, and so magnifies rounding


def test_each_process_has_batches_of_its_own_cut_as_they_need(runs: Path) -> None:
    seen = [
        [json.loads(line) for line in (runs / "together" / f"rank-{rank}.jsonl").read_text().splitlines()]
        for rank in range(2)
    ]
    assert [number for number, _ in seen[0]] == [0, 2, 4, 6]
    assert [number for number, _ in seen[1]] == [1, 3, 5, 7]
    assert any(left[1] != right[1] for left, right in zip(*seen, strict=True)), "they need not have as many passes"


def test_a_run_of_two_that_lost_one_goes_on_where_it_was(runs: Path) -> None:
    reference, resumed = runs / "together" / "model", runs / "killed" / "model"
    assert record(resumed / "model.safetensors") == record(reference / "model.safetensors")
    assert computed(resumed) == computed(reference)
    results = [
        json.loads((runs / name / f"result-{rank}.json").read_text())
        for name in ("together", "killed")
        for rank in (0, 1)
    ]
    assert all(result == results[0] for result in results)


def test_processes_that_measure_differently_stop_and_choose_together(runs: Path) -> None:
    """Their values may differ in a last digit; here they differ in everything."""
    first, second = (json.loads((runs / "apart" / f"result-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    steps, log = first
    assert steps == 3, "the third measurement of rank 0 was no better than its second"
    assert (log["best_step"], log["dev_ndcg"]) == (2, 0.5)
