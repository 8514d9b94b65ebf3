"""Recomputes every checksum of a folder that llara made (a model, an encoded corpus, or an index), and some vectors."""

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llara import contract
from llara.config import ModelConfig, VerifyConfig
from llara.encoding import manifest as corpus
from llara.encoding.shards import Vectors
from llara.errors import LlaraError, StorageError
from llara.files import confined, read_bytes, read_json
from llara.index.base import Manifest
from llara.index.opening import open_index
from llara.records import Document
from llara.terms import Terms

if TYPE_CHECKING:
    from llara.retriever import Retriever

SAMPLE = 16  # vectors that are computed again
SHOWN = 5  # damaged files that the message names
# Largest difference of a unit vector's component that its type on disk makes.
VECTOR_TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "int8": 1e-2}


@dataclass(frozen=True)
class VerifyReport:
    """What was found sound: a `model`, `reranker`, `vectors`, `documents` or `index` folder."""

    path: Path
    kind: str
    files: int
    """Files whose checksum was recomputed."""
    bytes: int
    """Their size together."""
    vectors: str
    """What was computed again beside checksums, or why nothing was."""

    def to_text(self) -> str:
        """Returns the verdict in one line."""
        more = f"; {self.vectors}" if self.vectors else ""
        return f"{self.path}: {self.kind}, {self.files:,} files, {self.bytes:,} bytes, all as written{more}"


def verify(config: VerifyConfig) -> VerifyReport:
    """Recomputes the checksums of a model, vectors or index folder, and vectors where there is a model to do it.

    Raises:
        StorageError: What is missing or damaged, or that the folder is none of the three.
        ModelError: A model that does not fit its record, or no longer gives the vectors it gave when it was saved.
    """
    path = config.path
    if not path.is_dir():
        raise StorageError(path, "is no folder" if path.exists() else "there is no such folder")
    if (path / contract.FILE_NAME).is_file():
        return _verify_model(path)
    if not (path / corpus.MANIFEST).is_file():
        raise StorageError(
            path,
            f"holds neither {contract.FILE_NAME} (a model saved by llara) nor {corpus.MANIFEST} (vectors or an index)",
        )
    content = read_json(path / corpus.MANIFEST)
    kind = content.get("kind") if isinstance(content, dict) else None
    return _verify_corpus(path) if kind in corpus.RESUME else _verify_index(path)


def _verify_model(path: Path) -> VerifyReport:
    from llara.loading import load_model
    from llara.reranker import load_reranker

    file, scores = path / contract.FILE_NAME, contract.form_of(path) == contract.RERANKER
    record = contract.read_record(path, contract.RERANKER if scores else contract.FORMAT)
    assert record is not None, "the caller has seen the file"
    contract.check_files(path, record, full=True)
    (load_reranker if scores else load_model)(ModelConfig(model=str(path), offline=True))  # runs the probe
    given = f"gives the {len(record['probe']['entries'])} {'scores' if scores else 'vectors'} it gave when saved"
    kind = "reranker" if scores else "model"
    return _report(path, kind, [file, *(confined(path, name) for name in record["files"])], given)


def _verify_corpus(path: Path) -> VerifyReport:
    content = corpus.read_manifest(path)
    damaged = list(corpus.check_folder(path, content, full=True))
    if damaged:
        raise _damage(path, damaged)
    vectors = _recompute(Vectors(path, content)) if content["kind"] == "vectors" else ""
    return _report(path, content["kind"], _corpus_files(path, content), vectors)


def _verify_index(path: Path) -> VerifyReport:
    open_index(path, verify=True)  # whether its parts are those that it was made with, and what was deleted
    return _report(path, "index", _index_files(path), "")


def _index_files(path: Path) -> list[Path]:
    content = Manifest.read(path)
    files = [path / corpus.MANIFEST, *(confined(path, name) for name in content.files)]
    documents = path / content.documents
    if documents.parent == path:  # a store of its own; that of a vectors folder is verified there
        files += _corpus_files(documents, corpus.read_manifest(documents))
    for part in content.parts:
        files += _index_files(path / part["folder"])
    return files


def _corpus_files(path: Path, content: dict[str, Any]) -> list[Path]:
    files = [path / corpus.MANIFEST, *(confined(path, name) for name in content["files"])]
    for entry in content["shards"]:
        shard = corpus.open_sidecar(path, entry)
        files += [shard.path(path, "json"), *(shard.path(path, suffix) for suffix in shard.files)]
    return files


def _recompute(vectors: Vectors) -> str:
    """Encodes a sample of the documents again; returns what that showed, or why it could not be done.

    Raises:
        StorageError: A vector that the same model does not give.
    """
    from llara.retriever import Retriever

    settings = _settings(vectors.folder)
    # The manifest knows the model's folder from wherever this runs; config.toml has it as it was typed then.
    model = corpus.find_model(vectors.manifest["about"].get("model_path", ""), vectors.folder)
    if not model or settings.get("trust_remote_code"):
        return "no vector was computed again: the folder names no model that may be run"
    try:
        known = ("template", "bos", "dtype", "backend")
        retriever = Retriever.load(model, offline=True, **{name: settings[name] for name in known if name in settings})
    except LlaraError as error:
        return f"no vector was computed again, its model does not open: {error}"
    if any(vectors.identity.get(name) != value for name, value in retriever.identity.items()):
        return f"no vector was computed again: {model} has changed since, or runs in another type"
    return _compare(vectors, retriever, model)


def _compare(vectors: Vectors, retriever: "Retriever", model: str) -> str:
    """Compares a sample with what the model that `model` names gives; see `_recompute`."""
    import numpy as np

    from llara.lexical import TermOptions
    from llara.model import DTYPE_TOLERANCE

    positions = np.unique(np.linspace(0, len(vectors) - 1, SAMPLE).astype(int)).tolist()
    documents = [vectors.documents.get(position) for position in positions]
    texts, titles = ([getattr(document, part) for document in documents] for part in ("text", "title"))
    length, sparse = vectors.identity["passage_length"], corpus.SPARSE in vectors.identity
    if sparse:
        options = TermOptions(**{name: vectors.sparse_settings()[name] for name in ("top_k", "expansion", "fold")})
        again, terms = retriever.encode_passages_with_terms(texts, titles, options, max_length=length)
        rows = zip(_rows(vectors.terms(), positions), range(len(positions)), strict=True)
        apart = [terms_apart(was.of(0), terms.of(row), options.top_k) for was, row in rows]
        _refuse_apart(vectors, documents, "sparse vector", apart, DTYPE_TOLERANCE[vectors.identity["dtype"]], model)
    else:
        again = retriever.encode_passages(texts, titles=titles, max_length=length)
    stored = np.array(_rows(vectors.shards(), positions), np.float32).reshape(len(positions), -1)
    allowed = max(DTYPE_TOLERANCE[vectors.identity["dtype"]], VECTOR_TOLERANCE[vectors.identity["vector_dtype"]])
    _refuse_apart(vectors, documents, "vector", np.abs(stored - again).max(axis=1).tolist(), allowed, model)
    return f"{len(positions)} vectors {'and sparse vectors ' if sparse else ''}computed again, all the same"


def terms_apart(stored: tuple[Any, Any], again: tuple[Any, Any], top_k: int) -> float:
    """Returns the largest difference of a weight, as a share of the stored vector's length.

    A term that only one of the two has stands against the smallest weight of the other where that has `top_k` terms,
    whose last ones may change places, and else against none.
    """
    weights = [dict(zip(ids.tolist(), found.tolist(), strict=True)) for ids, found in (stored, again)]
    floors = [min(each.values()) if len(each) >= top_k else 0.0 for each in weights]
    differences = [
        abs(weights[0].get(term, floors[0]) - weights[1].get(term, floors[1]))
        for term in weights[0].keys() | weights[1]
    ]
    length = math.sqrt(sum(weight**2 for weight in weights[0].values()))
    return max(differences, default=0.0) / max(length, 1.0)


def _refuse_apart(
    vectors: Vectors, documents: Sequence[Document], what: str, apart: Iterable[float], allowed: float, model: str
) -> None:
    for document, difference in zip(documents, apart, strict=True):
        if not difference <= allowed:  # also catches NaN
            reason = f"its {what} is not the one that {model} gives: {difference:.2g} apart"
            raise StorageError(vectors.folder, f"document {document.id!r}: {reason}, {allowed:.2g} allowed")


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "config.toml"
    try:
        return tomllib.loads(read_bytes(file).decode()) if file.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StorageError(file, f"cannot be read as TOML: {error}") from error


def _rows(shards: Iterable[Any], positions: Sequence[int]) -> list[Any]:
    """Returns the rows at rising positions: vectors, or the terms of one document each; the shards are walked once."""
    found: list[Any] = []
    start = 0
    for shard in shards:
        here = [position - start for position in positions if start <= position < start + len(shard)]
        found += [shard.part(row, row + 1) if isinstance(shard, Terms) else shard[row] for row in here]
        start += len(shard)
    return found


def _report(path: Path, kind: str, files: Sequence[Path], vectors: str) -> VerifyReport:
    return VerifyReport(path, kind, len(files), sum(file.stat().st_size for file in files), vectors)


def _damage(path: Path, errors: Sequence[StorageError]) -> StorageError:
    if len(errors) == 1:
        return errors[0]
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return StorageError(path, f"{len(errors)} files are damaged: " + "; ".join(map(str, errors[:SHOWN])) + more)
