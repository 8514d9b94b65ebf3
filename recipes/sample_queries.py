"""Writes training queries of a collection, at most COUNT of them drawn with a fixed seed, and their judgements.

python recipes/sample_queries.py COLLECTION QUERIES.jsonl COUNT
"""

import json
import sys
from pathlib import Path

import numpy as np

from llara.data import open_collection


def main(arguments: list[str]) -> int:
    path, output, count = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    collection = open_collection(path)
    assert collection is not None, f"{path} is no collection"
    queries = list(collection.queries("train"))
    kept = sorted(np.random.default_rng(0).permutation(len(queries))[:count].tolist())
    chosen = [queries[number] for number in kept]
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"_id": query.id, "text": query.text}, ensure_ascii=False) + "\n" for query in chosen]
    output.write_text("".join(rows), encoding="utf-8")
    ids = {query.id for query in chosen}
    judged = [qrel for qrel in collection.qrels("train") if qrel.query_id in ids]
    lines = [f"{qrel.query_id} 0 {qrel.document_id} {qrel.relevance}\n" for qrel in judged]
    output.with_suffix(".qrels").write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
