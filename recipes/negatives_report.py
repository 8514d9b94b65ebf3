"""Writes the dated result of recipes/negatives_cpu.sh: tables, time and memory per stage, command, hardware, commits.

python recipes/negatives_report.py OUTPUT [RESULT.md]
"""

import sys
from pathlib import Path

from scifact_report import COLLECTIONS, dated_report, write_result

INTRO = (
    "One seed, `mini` without adaptation; only the weights of `fused` were chosen, on dev. `again`, `mined` and "
    "`taught` go on from `first` with the same number of steps: on pairs, on hard negatives of ranks 3 to 200 that "
    "`first` mined, and on negatives of its first 12 hits with a reranker's scores to learn. `first+rerank` has the "
    "first 20 hits of `first` scored anew and no others, `fused` adds the relative scores of that run to those of "
    "`first`. Differences are to the first row, p by a paired two-sided randomisation test over queries. All models "
    "ran with int8 weights when they searched or scored."
)


def report(output: Path) -> str:
    tables = {}
    for name, title in COLLECTIONS.items():
        tables |= {name: title, f"{name}-again": f"{title}, beside the steps alone"}
        tables |= {f"{name}-rerank": f"{title}, a reranker"}
    weights = [f"{name} {(output / f'weights-{name}.txt').read_text(encoding='utf-8').strip()}" for name in COLLECTIONS]
    intro = f"{INTRO} Weights of `first` and of the reranker in `fused`: {'; '.join(weights)}."
    return dated_report(
        output, "Mined negatives, a reranker, and a teacher, on a CPU", "recipes/negatives_cpu.sh", intro, tables
    )


if __name__ == "__main__":
    sys.exit(write_result(sys.argv[1:], report))
