"""Writes the dated result of recipes/scifact_cpu.sh: tables, time and memory per stage, command, hardware, commit.

python recipes/scifact_report.py OUTPUT [RESULT.md]
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from llara.evaluate import Evaluation, markdown_table

COLLECTIONS = {"scifact": "SciFact, test split", "medquad": "MedQuAD, test split by focus"}
ROOT = Path(__file__).resolve().parent.parent


def hardware() -> str:
    names = [line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8").splitlines() if info.exists() else []


def commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def report(output: Path) -> str:
    stages = [json.loads(line) for line in (output / "stages.jsonl").read_text(encoding="utf-8").splitlines()]
    minutes = sum(stage["seconds"] for stage in stages) / 60
    parts = [
        "# SciFact and MedQuAD on a CPU",
        f"`recipes/scifact_cpu.sh`, {datetime.date.today().isoformat()}, commit {commit()}, {hardware()}; "
        f"{minutes:.0f} minutes in all. One seed. Differences are to `finetuned`, p by a paired two-sided "
        "randomisation test over queries; settings were chosen on dev (LOG.md).",
    ]
    for name, title in COLLECTIONS.items():
        evaluation = Evaluation.from_json(json.loads((output / f"{name}.json").read_text(encoding="utf-8")))
        parts += [f"## {title}: {len(evaluation.queries)} queries", markdown_table(evaluation.table())]
    rows = [["stage", "wall time (s)", "peak memory (MB)"]]
    rows += [[stage["stage"], f"{stage['seconds']:.1f}", str(stage["peak_megabytes"])] for stage in stages]
    return "\n\n".join([*parts, "## Stages", markdown_table(rows)]) + "\n"


def main(arguments: list[str]) -> int:
    output = Path(arguments[0])
    result = Path(arguments[1]) if len(arguments) > 1 else output / "result.md"
    result.write_text(report(output), encoding="utf-8")
    print(report(output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
