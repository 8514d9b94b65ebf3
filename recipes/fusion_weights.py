"""Writes the weights of relative scores under which two runs fuse best in nDCG@10 on the dev split of a collection.

python recipes/fusion_weights.py FIRST.trec SECOND.trec COLLECTION WEIGHTS.txt
"""

import sys
from pathlib import Path

from hybrid import best_weights

from llara.data import read_qrels, read_run

GRID = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of the second run, beside 1 for the first


def main(arguments: list[str]) -> int:
    first, second, collection, output = map(Path, arguments)
    runs = {
        name: {query: list(hits) for query, hits in read_run(path).items()}
        for name, path in (("first", first), ("second", second))
    }
    weights = best_weights(("first", "second"), runs, read_qrels(collection, "dev"), GRID)
    output.write_text(" ".join(f"{weight:g}" for weight in weights) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
