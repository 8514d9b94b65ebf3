"""Writes the dated result of recipes/scifact_cpu.sh: tables, time and memory per stage, command, hardware, commits.

python recipes/scifact_report.py OUTPUT [RESULT.md]
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measured import commit, read_stages

from llara.evaluate import Evaluation, markdown_table

COLLECTIONS = {"scifact": "SciFact, test split", "medquad": "MedQuAD, test split by focus"}


def hardware() -> str:
    names = [line.partition(":")[2].strip() for line in cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8").splitlines() if info.exists() else []


def when(stages: list[dict[str, Any]]) -> str:
    """Returns the days on which the stages ran; today where an old record does not say."""
    today = datetime.date.today().isoformat()
    dates = sorted({stage.get("date", today) for stage in stages})
    return " to ".join(dict.fromkeys([dates[0], dates[-1]]))


def which(stages: list[dict[str, Any]]) -> str:
    """Returns the commits that the stages ran on; the current one where an old record does not say."""
    now = commit()
    commits = dict.fromkeys(stage.get("commit", now) or "unknown" for stage in stages)
    return f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}"


def report(output: Path) -> str:
    intro = (
        "One seed. Differences are to `finetuned`, p by a paired two-sided randomisation test over queries; settings "
        "were chosen on dev (LOG.md)."
    )
    return dated_report(output, "SciFact and MedQuAD on a CPU", "recipes/scifact_cpu.sh", intro, COLLECTIONS)


def dated_report(output: Path, title: str, command: str, intro: str, tables: Mapping[str, str]) -> str:
    """Returns what a recipe found: its evaluations, by the name of their file and with a title, and its stages."""
    stages = list(read_stages(output / "stages.jsonl").values())
    minutes = sum(stage["seconds"] for stage in stages) / 60
    made = f"`{command}`, {when(stages)}, {which(stages)}, {hardware()}; {minutes:.0f} minutes in all."
    parts = [f"# {title}", f"{made} {intro}"]
    for name, heading in tables.items():
        evaluation = Evaluation.from_json(json.loads((output / f"{name}.json").read_text(encoding="utf-8")))
        parts += [f"## {heading}: {len(evaluation.queries)} queries", markdown_table(evaluation.table())]
    rows = [["stage", "wall time (s)", "peak memory (MB)"]]
    rows += [[stage["stage"], f"{stage['seconds']:.1f}", str(stage["peak_megabytes"])] for stage in stages]
    return "\n\n".join([*parts, "## Stages", markdown_table(rows)]) + "\n"


def main(arguments: list[str]) -> int:
    return write_result(arguments, report)


def write_result(arguments: list[str], report: Callable[[Path], str]) -> int:
    """Writes and prints the report on a folder; `arguments` are that and, where given, the file of the report."""
    output = Path(arguments[0])
    result = Path(arguments[1]) if len(arguments) > 1 else output / "result.md"
    text = report(output)
    result.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
