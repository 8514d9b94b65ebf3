"""Every configuration in recipes/ is one that its command takes, and stages of a recipe run once."""

import datetime
import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llara.config import AdaptConfig, FinetuneConfig, to_toml
from llara.evaluate import Evaluation
from llara.training.adapt import adapt
from tests import tiny
from tests.training.helpers import write_text

ROOT = Path(__file__).resolve().parent.parent
# The plans of recipes/ablation.py have many arms each; tests/test_ablation.py loads them.
CONFIGS = sorted(path for path in (ROOT / "recipes").rglob("*.toml") if not path.name.startswith("ablation"))
KINDS = {"adapt": AdaptConfig, "finetune": FinetuneConfig}


def test_there_are_configurations() -> None:
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration_loads_through_the_command_line(path: Path) -> None:
    command = path.stem.rpartition("_")[2]
    assert command in KINDS, f"{path.name} must end in the command it belongs to"
    answer = subprocess.run(
        [sys.executable, "-m", "llara", command, "--config", str(path), "--print-config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    effective, written = tomllib.loads(answer.stdout), tomllib.loads(path.read_text(encoding="utf-8"))
    assert written.items() <= effective.items()
    values = {key: tuple(map(Path, value)) if isinstance(value, list) and key in ("corpus", "train") else value
              for key, value in effective.items()}  # fmt: skip
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    assert tomllib.loads(to_toml(KINDS[command](**{**values, "output": Path(values["output"])}))) == effective


@pytest.mark.parametrize("name", ["7b_adapt.toml", "7b_qlora_adapt.toml"])
def test_what_a_large_model_is_adapted_with_runs_on_a_small_one(name: str, tmp_path: Path) -> None:
    values = tomllib.loads((ROOT / "recipes" / name).read_text(encoding="utf-8"))
    small = {"batch_size": 4, "steps": 2, "token_budget": 64, "chunk_length": 16, "min_chunk_length": 4}
    here = {"dtype": "float32", "quantize": "none", "device": "cpu", "offline": True}
    corpus = write_text(tmp_path / "text.jsonl")
    paths = {"model": str(tiny.save_base(tmp_path / "base")), "corpus": (corpus,), "output": tmp_path / "out"}
    result = adapt(AdaptConfig(**{**values, **small, **here, **paths}))
    assert result.steps == 2
    assert {"loss_ebae", "loss_ebar"} <= result.log.keys()
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", tmp_path / "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "proj" in key}, "LoRA on all linear maps, merged"


def measured(record: Path, stage: str, *command: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "recipes" / "measured.py"
    return subprocess.run(
        [sys.executable, str(script), str(record), stage, "--", *command], capture_output=True, text=True, check=False
    )


def test_a_stage_runs_once_and_is_noted(tmp_path: Path) -> None:
    record, made = tmp_path / "stages.jsonl", tmp_path / "made"
    append = [sys.executable, "-c", f"open({str(made)!r}, 'a').write('x')"]
    for _ in range(2):
        assert measured(record, "one", *append).returncode == 0
    assert made.read_text() == "x"
    entry = json.loads(record.read_text())
    assert (entry["stage"], entry["command"], entry["configs"]) == ("one", append, {})
    assert datetime.date.fromisoformat(entry["date"])
    assert entry["commit"] is None or entry["commit"].removesuffix("-dirty")
    assert entry["seconds"] >= 0
    assert entry["peak_megabytes"] > 0


def test_a_failed_stage_is_not_noted(tmp_path: Path) -> None:
    record = tmp_path / "stages.jsonl"
    assert measured(record, "one", sys.executable, "-c", "raise SystemExit(3)").returncode == 3
    assert not record.exists()


def entries(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def test_a_stage_runs_again_when_its_command_or_configuration_has_changed(tmp_path: Path) -> None:
    record, made, config = tmp_path / "stages.jsonl", tmp_path / "made", tmp_path / "job.toml"
    append = [sys.executable, "-c", f"open({str(made)!r}, 'a').write('x')", "--config", str(config)]
    config.write_text("steps = 1\n")
    for _ in range(2):
        assert measured(record, "one", *append).returncode == 0
    assert entries(record)[0]["configs"] == {str(config): hashlib.sha256(b"steps = 1\n").hexdigest()}
    config.write_text("steps = 2\n")
    assert "again, its command or configuration has changed" in measured(record, "one", *append).stderr
    assert made.read_text() == "xx"
    for _ in range(2):
        measured(record, "one", *append[:3], f"--config={config}")
    assert made.read_text() == "xxx"
    assert len(entries(record)) == 1
    # Another commit alone is no reason, and entries of before commands were noted count.
    record.write_text(json.dumps({**entries(record)[-1], "commit": "0000000"}) + "\n")
    measured(record, "one", *append[:3], f"--config={config}")
    record.write_text('{"stage": "one", "seconds": 1.0, "peak_megabytes": 9}\n')
    measured(record, "one", *append)
    assert made.read_text() == "xxx"


def test_what_came_after_a_stage_that_runs_again_runs_again(tmp_path: Path) -> None:
    record, made = tmp_path / "stages.jsonl", tmp_path / "made"

    def recipe(change: str = "") -> str:
        for stage in ("one", "two", "three", "four"):
            end = change if stage == "two" else ""
            code = f"open({str(made)!r}, 'a').write({stage[:2]!r}); {end}"
            if measured(record, stage, sys.executable, "-c", code).returncode:
                break
        return made.read_text()

    assert recipe() == recipe() == "ontwthfo"
    assert recipe("pass") == recipe("pass") == "ontwthfo" + "twthfo"
    assert [entry["stage"] for entry in entries(record)] == ["one", "two", "three", "four"]
    # It failed: nothing that stands on it counts as done, not even with the command of before.
    assert recipe("raise SystemExit(3)") == "ontwthfo" + "twthfo" + "tw"
    assert [entry["stage"] for entry in entries(record)] == ["one"]
    assert recipe("pass") == "ontwthfo" + "twthfo" + "tw" + "twthfo"


def test_a_line_that_a_killed_run_left_unfinished_is_written_anew(tmp_path: Path) -> None:
    record, made = tmp_path / "stages.jsonl", tmp_path / "made"
    append = [sys.executable, "-c", f"open({str(made)!r}, 'a').write('x')"]
    for stage in ("one", "two"):
        measured(record, stage, *append)
    record.write_bytes(record.read_bytes()[:-40])
    for _ in range(2):
        for stage in ("one", "two"):
            assert measured(record, stage, *append).returncode == 0
    assert made.read_text() == "xxx"
    assert [entry["stage"] for entry in entries(record)] == ["one", "two"]
    assert list(tmp_path.glob(".tmp-*")) == []


def reported(folder: Path, *stages: dict[str, Any]) -> str:
    (folder / "stages.jsonl").write_text("".join(json.dumps(stage) + "\n" for stage in stages))
    values = {"a": {"R@1": [1.0]}}
    empty = Evaluation(("R@1",), ("a",), ("q1",), {"a": {"R@1": 1.0}}, values, (), {"a": 0}, {"a": 0})
    for name in ("scifact", "medquad"):
        (folder / f"{name}.json").write_text(json.dumps(empty.to_json()))
    command = [sys.executable, str(ROOT / "recipes" / "scifact_report.py"), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.rstrip() == (folder / "result.md").read_text().rstrip()
    return answer.stdout


def test_a_report_names_the_days_and_commits_of_its_stages(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"stage": "one", "seconds": 60.0, "peak_megabytes": 7, "commit": "aaaaaaa", "date": "2020-01-03"},
        {"stage": "two", "seconds": 30.0, "peak_megabytes": 8, "commit": "bbbbbbb-dirty", "date": "2020-01-02"},
        {"stage": "two", "seconds": 120.0, "peak_megabytes": 9, "commit": None, "date": "2020-01-02"},
        {"stage": "three", "seconds": 1.0, "peak_megabytes": 9, "commit": "ccccccc-dirty", "date": "2020-01-05"},
    ]
    text = reported(tmp_path, *stages)
    assert ", 2020-01-02 to 2020-01-05, commits aaaaaaa, unknown, ccccccc-dirty, " in text
    assert "; 3 minutes in all" in text
    assert "30.0" not in text
    assert ", 2020-01-03, commit aaaaaaa, " in reported(tmp_path, stages[0])


def test_a_report_of_a_record_without_commits_names_the_current_one(tmp_path: Path) -> None:
    text = reported(tmp_path, {"stage": "one", "seconds": 60.0, "peak_megabytes": 7})
    assert re.search(r", \d{4}-\d\d-\d\d, commit [0-9a-z]+(-dirty)?, ", text)
