"""A run that is killed at any moment and goes on equals one that was never killed, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import ModelConfig
from llara.loading import load_model
from tests.training.helpers import WORDS, computed, log_lines, record, sentence, write_lines

KILLED = 9


def crash(job: str, base: Path, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Runs `crash.py` and returns its cells, the reference first."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.crash", job, str(base), str(data), str(folder)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def portable(folder: Path) -> dict[str, Any]:
    """What a model's record says, but for the configuration, which names the output's path, and the log's timings."""
    found: dict[str, Any] = {**json.loads((folder / "llara.json").read_text()), "digest": ""}
    other = ("training_config.toml", "training_log.jsonl")
    found["files"] = {name: entry for name, entry in found["files"].items() if name not in other}
    return found


def check_cells(cells: list[dict[str, Any]], folder: Path, save_steps: tuple[int, ...], accumulation: int) -> None:
    reference, *killed = cells
    expected = reference["runs"][0]["seen"]
    assert [number for number, _ in expected] == list(range(len(expected)))
    made = folder / "reference" / "model"
    for cell in killed:
        *before, last = cell["runs"]
        assert last["status"] == 0
        assert before[0]["status"] == KILLED, cell
        assert last["checked"], "the finished folder is complete"
        for run in cell["runs"]:
            stray = {name for name in run["left"] if not name.startswith("seen-")} - {"model", "model.partial"}
            assert not stray
            assert "model" not in run["left"] or run["checked"], "a folder with the final name is complete"
            if run["seen"]:
                first = run["seen"][0][0]
                assert first in {step * accumulation for step in (0, *save_steps)}
                assert run["seen"] == expected[first : first + len(run["seen"])], "none repeated, none skipped"
        assert last["left"][0] == "model" and "model.partial" not in last["left"]
        again = folder / cell["cell"] / "model"
        assert portable(again) == portable(made), cell["moments"]
        for name in ("model.safetensors", "training.json"):
            assert record(again / name) == record(made / name), (cell["moments"], name)
        assert computed(again) == computed(made), cell["moments"]


@pytest.mark.slow
def test_killed_adaptation_equals_an_uninterrupted_one(base: Path, corpus: Path, tmp_path: Path) -> None:
    cells = crash("adapt", base, corpus, tmp_path / "runs")
    check_cells(cells, tmp_path / "runs", (3, 6, 9, 10), 2)
    assert len(cells) == 14
    made = tmp_path / "runs" / "reference" / "model"
    assert [line["step"] for line in log_lines(made)] == [4, 8, 10]  # saved at 3, 6, 9: sums go on
    assert {"loss", "loss_ebae", "loss_ebar", "grad_norm"} <= log_lines(made)[0].keys()
    load_model(ModelConfig(model=str(made), device="cpu", verify=True))


@pytest.mark.slow
def test_adaptation_killed_in_twenty_steps_trains_on_what_would_have_followed(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    cells = crash("adapt-often", base, corpus, tmp_path / "runs")
    check_cells(cells, tmp_path / "runs", tuple(range(2, 28, 2)), 3)
    reference, killed = cells
    assert [run["status"] for run in killed["runs"]] == [KILLED] * 20 + [0]
    # Without what pads it, a row says which chunk it is.
    batches = [
        [str(row).rstrip(", 2]") for rows in passes for row in rows] for _, passes in reference["runs"][0]["seen"]
    ]
    assert len(batches) == 81
    for epoch in range(10):
        chunks = [row for batch in batches[8 * epoch : 8 * epoch + 8] for row in batch]
        assert len(chunks) == len(set(chunks)) == 22, "an epoch takes every chunk once"
    assert max(len(passes) for _, passes in reference["runs"][0]["seen"]) > 1, "batches are cut by the token budget"
    lines = computed(tmp_path / "runs" / "reference" / "model")
    assert [line["step"] for line in lines] == sorted({*range(3, 28, 3), *range(4, 28, 4)})
    assert [line["step"] for line in lines if "recall_ebae" in line] == [4, 8, 12, 16, 20, 24, 27]


@pytest.mark.slow
def test_killed_finetuning_equals_an_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 13), ("more", 5), ("dev", 7)):
        write_lines(
            tmp_path / f"{name}.jsonl",
            (
                {
                    "query": f"{WORDS[i]} {name} {i}",
                    "pos": [sentence(rng, 8), sentence(rng, 9)],
                    "neg": [f"{sentence(rng, 5)} {i}"] * (i % 3),
                    "pos_scores": [2.0, 3.0],
                    "neg_scores": [0.5] * (i % 3),
                }
                for i in range(count)
            ),
        )
    cells = crash("finetune", base, tmp_path, tmp_path / "runs")
    check_cells(cells, tmp_path / "runs", (3, 6, 9, 10), 2)
    assert len(cells) == 7
    lines = computed(tmp_path / "runs" / "reference" / "model")
    assert [line["step"] for line in lines if "dev_ndcg" in line] == [2, 4, 6, 8, 10]
