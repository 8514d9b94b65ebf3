"""Runs one stage of a recipe, once: notes its wall time and peak memory, and skips it when it is noted already.

    python recipes/measured.py RECORD.jsonl STAGE -- COMMAND...

What a command that was stopped had finished is kept by the command itself; its stage is then simply run again.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def finished_stages(record: Path) -> set[str]:
    if not record.exists():
        return set()
    return {json.loads(line)["stage"] for line in record.read_text(encoding="utf-8").splitlines()}


def main(arguments: list[str]) -> int:
    if len(arguments) < 4 or arguments[2] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    record, stage, command = Path(arguments[0]), arguments[1], arguments[3:]
    if stage in finished_stages(record):
        print(f"== {stage}: done before", file=sys.stderr)
        return 0
    print(f"== {stage}", file=sys.stderr, flush=True)
    began = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // (
            2**20 if sys.platform == "darwin" else 2**10
        )
        entry = {"stage": stage, "seconds": round(time.monotonic() - began, 1), "peak_megabytes": megabytes}
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
