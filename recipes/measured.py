"""Runs one stage of a recipe, once: notes command, wall time and peak memory, and skips it when it is noted already.

    python recipes/measured.py RECORD.jsonl STAGE -- COMMAND...

A stage runs again when its command, or the content of a `--config` file in it, is another than the one noted; it may
make other files then, so the stages noted after it are forgotten and run again, too. What a command that was stopped
had finished is kept by the command itself; its stage is then simply run again.
"""

import datetime
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def read_stages(record: Path) -> dict[str, dict[str, Any]]:
    """Returns the last entry of every stage, in the order in which they finished."""
    stages: dict[str, dict[str, Any]] = {}
    for line in _whole_lines(record):
        entry = json.loads(line)
        stages.pop(entry["stage"], None)
        stages[entry["stage"]] = entry
    return stages


def add_stage(record: Path, entry: dict[str, Any]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    _replace(record, [*_whole_lines(record), json.dumps(entry).encode()])


def forget_from(record: Path, stage: str) -> None:
    """Drops the entries of a stage, and of every stage that was first noted after it."""
    lines = _whole_lines(record)
    named = [json.loads(line)["stage"] for line in lines]
    before = set(named[: named.index(stage)])
    _replace(record, [line for line, name in zip(lines, named, strict=True) if name in before])


def _whole_lines(record: Path) -> list[bytes]:
    # Behind the last line end stands nothing, or what a killed run left of a line.
    return record.read_bytes().split(b"\n")[:-1] if record.exists() else []


def _replace(record: Path, lines: list[bytes]) -> None:
    staged = record.with_name(f".tmp-{record.name}")
    staged.write_bytes(b"".join(line + b"\n" for line in lines))
    staged.replace(record)


def config_digests(command: list[str]) -> dict[str, str | None]:
    """Returns the SHA-256 of every `--config` file in a command, None where there is no such file."""
    named = [after for flag, after in itertools.pairwise(command) if flag == "--config"]
    named += [argument.partition("=")[2] for argument in command if argument.startswith("--config=")]
    return {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).is_file() else None for name in named
    }


def commit() -> str | None:
    """Returns the commit of the code, with `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def main(arguments: list[str]) -> int:
    if len(arguments) < 4 or arguments[2] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    record, stage, command = Path(arguments[0]), arguments[1], arguments[3:]
    asked = {"command": command, "configs": config_digests(command)}
    noted = read_stages(record).get(stage)
    # An entry from before commands were noted counts as one of this command.
    if noted is not None and all(noted.get(key, value) == value for key, value in asked.items()):
        print(f"== {stage}: done before", file=sys.stderr)
        return 0
    print(
        f"== {stage}{': again, its command or configuration has changed' if noted else ''}", file=sys.stderr, flush=True
    )
    if noted is not None:
        forget_from(record, stage)  # at once, for the command may fail or be stopped when it has changed files
    code_ran = commit()  # files may change while the command runs
    began = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        seconds = round(time.monotonic() - began, 1)
        megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // (
            2**20 if sys.platform == "darwin" else 2**10
        )
        cost = {"stage": stage, "seconds": seconds, "peak_megabytes": megabytes}
        add_stage(record, {**cost, **asked, "commit": code_ran, "date": datetime.date.today().isoformat()})
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
