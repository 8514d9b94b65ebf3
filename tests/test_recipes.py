"""Every configuration in recipes/ is one that its command takes, and stages of a recipe run once."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llara.config import AdaptConfig, FinetuneConfig, to_toml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "recipes").rglob("*.toml"))
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
    assert entry["stage"] == "one"
    assert entry["seconds"] >= 0
    assert entry["peak_megabytes"] > 0


def test_a_failed_stage_is_not_noted(tmp_path: Path) -> None:
    record = tmp_path / "stages.jsonl"
    assert measured(record, "one", sys.executable, "-c", "raise SystemExit(3)").returncode == 3
    assert not record.exists()
