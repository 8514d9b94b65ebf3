"""A corpus, encoders and a retriever without a model, and digests of whole folders."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llara.config import ModelConfig
from llara.data import read_rows
from llara.encoding.shards import VectorsSummary, write_vectors
from llara.lexical import Tokens
from llara.records import Document
from llara.terms import Terms

DIM = 8
IDENTITY: dict[str, Any] = {"model_fingerprint": "f" * 8, "template": "paper"}
VOCABULARY = 50
SPARSE: dict[str, Any] = {"top_k": 12, "expansion": False, "fold": False, "vocabulary": VOCABULARY}


def corpus_lines(count: int) -> list[bytes]:
    """Rows of a corpus: with and without title and metadata, short and long, in several scripts."""
    rows = []
    for number in range(count):
        fields: dict[str, Any] = {"_id": f"doc{number}", "text": f"Text {number} Größe 漢字\n" * (1 + number % 7)}
        if number % 2:
            fields["title"] = f"Title {number}"
        if number % 3 == 0:
            fields["year"] = 1900 + number
        rows.append(json.dumps(fields, ensure_ascii=number % 5 == 0).encode())
    return rows


def write_corpus(path: Path, rows: Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(row + b"\n" for row in rows))
    return path


def vector_of(document: Document) -> list[float]:
    digest = hashlib.sha256(f"{document.title}|{document.text}".encode()).digest()
    return [float(byte) for byte in digest[:DIM]]


class FakeEncoder:
    """Gives vectors that depend on the text alone, and remembers which documents it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, documents: list[Document]) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.calls.append([document.id for document in documents])
        return np.array([vector_of(document) for document in documents], np.float32)


def terms_of(document: Document) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Up to 12 terms in the order of `Terms`; some documents have none."""
    digest = hashlib.sha256(f"terms|{document.title}|{document.text}".encode()).digest()
    ids = np.unique(np.frombuffer(digest[: digest[0] % 13], np.uint8) % VOCABULARY)
    weights = np.float32([(digest[number] + 1) / 64 for number in range(len(ids))])
    order = np.lexsort((ids, -weights))
    return ids[order], weights[order]


class SparseEncoder(FakeEncoder):
    """Gives sparse vectors along with the others."""

    def __call__(self, documents: list[Document]) -> Any:
        return super().__call__(documents), Terms.of_rows([terms_of(document) for document in documents])


class FakeRetriever:
    """Has the face of `Retriever`; its vectors tell what it was asked."""

    dim = 4
    passage_length = 160
    identity: dict[str, Any] = {"model_fingerprint": "abc", "contract": {"template": "paper"}}  # noqa: RUF012

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.length: int | None = None
        self.calls: list[tuple[int, int, int | None]] = []

    def for_job(self, config: ModelConfig) -> "FakeRetriever":
        self.loaded = vars(config)
        return self

    def tokenise_passages(
        self, texts: Sequence[str], titles: Sequence[str], max_length: int | None, with_terms: bool
    ) -> Tokens:
        assert not with_terms
        self.length = max_length
        return Tokens([[len(text), len(title), 0, 1] for text, title in zip(texts, titles, strict=True)])

    def embed_passages(
        self, tokens: Tokens, token_budget: int, on_batch: Callable[[int], None]
    ) -> np.ndarray[Any, Any]:
        self.calls.append((len(tokens.rows), token_budget, self.length))
        on_batch(len(tokens.rows))
        vectors = np.zeros((len(tokens.rows), self.dim), np.float32)
        vectors[:, :4] = tokens.rows
        return vectors


def run_sparse(corpus: Path, output: Path, shard_size: int = 10, **changes: Any) -> VectorsSummary:
    """Runs the writer as `encode --sparse` does."""
    sparse = {"encode": SparseEncoder(), "identity": {**IDENTITY, "sparse": SPARSE}}
    return run(corpus, output, shard_size, **(sparse | changes))


def run(corpus: Path, output: Path, shard_size: int = 10, **changes: Any) -> VectorsSummary:
    """Runs the writer as `encode` does; `changes` are arguments of `write_vectors`."""
    arguments: dict[str, Any] = {
        "encode": FakeEncoder(),
        "identity": IDENTITY,
        "dim": DIM,
        "vector_dtype": "float32",
        "shard_size": shard_size,
        "extras": {"config.toml": b'model = "mini"\n'},
    }
    return write_vectors(output, read_rows([corpus]), **(arguments | changes))


def tree(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, hidden ones included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
