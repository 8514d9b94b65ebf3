"""A corpus of any size in which some lines are malformed, and the check that every row is in exactly one place."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llara.encoding.shards import Vectors

# What a malformed line is, and what must be said of it. A duplicate, too, is in neither of the two places twice.
MALFORMED: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"_id": "d%d", "text": "no end', "broken JSON"),
    "not an object": (b'["d%d", "a list"]', "not a JSON object"),
    "blank": (b"", "blank"),
    "white space": (b" \t", "blank"),
    "bad UTF-8": (b'{"_id": "d%d", "text": "\xff\xfe"}', "UTF-8"),
    "NUL byte": (b'{"_id": "d%d", "text": "a\x00b"}', "broken JSON: Invalid control character"),
    "NUL character": (b'{"_id": "d%d", "text": "a\\u0000b"}', "NUL"),
    "not text": (b'{"_id": "d%d", "text": 3}', "text"),
    "no id": (b'{"text": "of nobody"}', "no id"),
    "nested too deep": (b"[" * 50_000, "broken JSON"),
}


def malformed_rows(rows: int, count: int, seed: int = 0) -> dict[int, str]:
    """Returns which rows of a corpus, from 0, are malformed and how: as many of each kind as can be."""
    places = random.Random(seed).sample(range(rows), count)
    kinds = list(MALFORMED)
    return {place: kinds[number % len(kinds)] for number, place in enumerate(places)}


def corpus_rows(rows: int, malformed: dict[int, str]) -> Iterator[bytes]:
    """Yields the lines of the corpus; short passages, whose ids are `d` and the number of the row from 0."""
    for row in range(rows):
        if row not in malformed:
            yield json.dumps({"_id": f"d{row}", "text": f"short passage {row} of the corpus"}).encode()
            continue
        line = MALFORMED[malformed[row]][0]
        yield line % row if b"%d" in line else line


def faults(output: Path, corpus: str, rows: int, malformed: dict[int, str]) -> list[str]:
    """Returns what is wrong with a vectors folder made from the corpus, named as the command was given it."""
    found: list[str] = []
    lines = (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    listed: dict[int, dict[str, Any]] = {entry["row"] - 1: entry for entry in map(json.loads, lines)}
    if len(listed) != len(lines) or listed.keys() != malformed.keys():
        found.append(f"{len(lines)} rows were rejected, {len(listed.keys() ^ malformed.keys())} of them the wrong ones")
    for row, kind in malformed.items():
        entry = listed.get(row, {"file": "", "line": 0, "reason": ""})
        if (entry["file"], entry["line"]) != (corpus, row + 1) or MALFORMED[kind][1] not in entry["reason"]:
            found.append(f"row {row + 1}, {kind}: reported as {entry}")
    vectors = Vectors.open(output)
    if sum(len(shard) for shard in vectors.shards()) != rows - len(malformed):
        found.append("the number of vectors is another")
    kept = iter(row for row in range(rows) if row not in malformed)
    for start in range(0, len(vectors), 10_000):
        for identifier in vectors.documents.ids(start, start + 10_000):
            if identifier != f"d{next(kept, -1)}":
                return [*found, f"{identifier} is not where it belongs"]
    return found
