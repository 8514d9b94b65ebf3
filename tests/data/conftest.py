"""Small files in every format the readers know."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[[str, Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file: bytes and text as they are, a list as JSON lines; a name that ends in .gz is packed."""

    def writer(name: str, content: str | bytes | Iterable[Any]) -> Path:
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return writer


@pytest.fixture
def beir(write: Write, tmp_path: Path) -> Path:
    """A BEIR folder with forty training queries, one test query and no dev split."""
    folder = tmp_path / "set"
    write("set/corpus.jsonl", [{"_id": f"d{n}", "title": f"T{n}", "text": f"text {n}"} for n in range(41)])
    write("set/queries.jsonl", [{"_id": f"q{n}", "text": f"query {n}", "metadata": {}} for n in range(42)])
    header = "query-id\tcorpus-id\tscore\n"
    write("set/qrels/train.tsv", header + "".join(f"q{n}\td{n}\t1\n" for n in range(40)))
    write("set/qrels/test.tsv", header + "q40\td40\t1\nq40\td1\t0\n")
    return folder


@pytest.fixture
def squad() -> Callable[..., str]:
    """Makes SQuAD JSON from (title, [(context, [(question id, question)])])."""

    def maker(*articles: tuple[str, list[tuple[str, list[tuple[str, str]]]]]) -> str:
        data = []
        for title, paragraphs in articles:
            rows = [
                {"context": text, "qas": [{"id": key, "question": asked, "answers": []} for key, asked in questions]}
                for text, questions in paragraphs
            ]
            data.append({"title": title, "paragraphs": rows})
        return json.dumps({"data": data, "version": "1.1"}, indent=1)

    return maker
