"""Ten thousand malformed lines in a corpus of a million.

    python benchmarks/malformed.py [--rows 1000000] [--malformed 10000]

Ten kinds of malformed lines (broken JSON, not an object, blank, bad UTF-8, NUL, ...) stand at seeded places. The
command is `llara encode`, in a process of its own, with a stand-in for the model that gives vectors at once. Each line
must be reported with its file, its line and why; every row must be in exactly one of the vectors and `rejected.jsonl`;
nothing may be printed that looks like a traceback. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import common.checkout  # noqa: F401 - the next imports need it
from common.stand_in import encode

from tests.children import preload, run
from tests.encoding.malformed import MALFORMED, corpus_rows, faults, malformed_rows

SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--malformed", type=int, default=10_000)
    options = parser.parse_args()
    preload()
    malformed = malformed_rows(options.rows, options.malformed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with (folder / "corpus.jsonl").open("wb") as file:
            file.writelines(line + b"\n" for line in corpus_rows(options.rows, malformed))
        began = time.perf_counter()
        ended = run(encode("--corpus", "corpus.jsonl", "--output", "vectors"), folder)
        seconds = time.perf_counter() - began
        assert ended.status == 0, ended.err
        found = faults(folder / "vectors", "corpus.jsonl", options.rows, malformed)
        result = json.loads(ended.out)
    tracebacks = ended.err.count("Traceback")
    for fault in found[:SHOWN]:
        print(fault)
    documents, rejected = result["documents"], result["rejected"]
    print(f"{options.rows:,} rows in {seconds:.0f} s: {documents:,} vectors, {rejected:,} rejected")
    print(f"{len(found)} faults, {tracebacks} tracebacks; the command said: {ended.err.splitlines()[-2]}")
    figures = {"rows": options.rows, "documents": documents, "rejected": rejected, "kinds": len(MALFORMED)}
    figures |= {"faults": len(found), "tracebacks": tracebacks}
    target = {"rejected": options.malformed, "faults": 0, "tracebacks": 0}
    met = rejected == options.malformed == options.rows - documents and not found and not tracebacks
    print(json.dumps({"name": "malformed", "figures": figures, "target": target, "met": met}))


if __name__ == "__main__":
    main()
