"""How long `llara --help` and `--version` take, beside an interpreter that does nothing.

    python benchmarks/startup.py [--runs 10]

The three commands take turns, so that a busy moment of the machine hits all of them. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

TARGET_SECONDS = 0.3
MAIN = "import sys; from llara.cli import main; sys.exit(main(sys.argv[1:]))"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "llara --version": ["-c", MAIN, "--version"],
    "llara --help": ["-c", MAIN, "--help"],
    "llara adapt --help": ["-c", MAIN, "adapt", "--help"],
    "llara plan adapt --help": ["-c", MAIN, "plan", "adapt", "--help"],
}


def seconds(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(runs + 1):
        for name, arguments in COMMANDS.items():
            taken = seconds(arguments)
            if round_:  # the first round fills the caches of disk and bytecode
                times[name].append(taken)
    medians = {name: round(statistics.median(each), 4) for name, each in times.items()}
    for name, median in medians.items():
        print(f"{name:<24} median {median:.3f} s, {min(times[name]):.3f} to {max(times[name]):.3f}, {runs} runs")
    met = max(medians["llara --help"], medians["llara --version"]) < TARGET_SECONDS
    target = {"llara --help": TARGET_SECONDS, "llara --version": TARGET_SECONDS}
    print(json.dumps({"name": "startup", "figures": medians, "target": target, "met": met}))


if __name__ == "__main__":
    main()
