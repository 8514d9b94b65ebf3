"""How many of the best hits of one run are among the best of another: an approximate index beside an exact one.

    python benchmarks/overlap.py EXACT.trec OTHER.trec [--top-k 10]

Both are runs of `llara search` with the same queries. Documents count by their ids, so copies with equal scores are
told apart, which both sides order alike. The last line is one JSON object.
"""

import argparse
import json
from pathlib import Path

from llara.data import read_run

TARGET = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exact", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--top-k", type=int, default=10)
    given = parser.parse_args()
    exact, other = (
        {query: {hit.document_id for hit in hits[: given.top_k]} for query, hits in read_run(path).items()}
        for path in (given.exact, given.other)
    )
    if not exact or exact.keys() != other.keys():
        parser.error("the runs have no queries, or not the same ones")
    shares = [len(best & other[query]) / len(best) for query, best in exact.items()]
    figures = {"queries": len(shares), "overlap": round(sum(shares) / len(shares), 4), "least": min(shares)}
    met = figures["overlap"] >= TARGET
    print(json.dumps({"name": "overlap", "figures": figures, "target": TARGET, "met": met}))


if __name__ == "__main__":
    main()
