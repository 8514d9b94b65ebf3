"""Recomputes checksums, counts and some vectors of a folder that llara made: a model, an encoded corpus, an index."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llara import contract
from llara.config import ModelConfig, VerifyConfig
from llara.encoding import manifest as corpus
from llara.encoding.counts import check_counts, count_lines
from llara.encoding.documents import DocumentStore
from llara.encoding.shards import Vectors
from llara.errors import LlaraError, StorageError
from llara.files import confined, read_json
from llara.index.base import IDS, Floats, Index, Keeps, Manifest, Positions
from llara.index.opening import open_index
from llara.index.parts import all_deleted
from llara.index.passages import Passage, some_passages
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
    documents: int
    """Documents that were counted again, file by file, without those deleted from an index; 0 in a model."""
    deleted: int
    """Documents that are there, and were deleted from the index."""
    vectors: str
    """What was computed again beside checksums, or why nothing was."""

    def to_text(self) -> str:
        """Returns the verdict in one line."""
        more = f"; {self.vectors}" if self.vectors else ""
        counted = f"{self.documents:,} documents, " if self.documents else ""
        counted += f"{self.deleted:,} deleted, " if self.deleted else ""
        return f"{self.path}: {self.kind}, {counted}{self.files:,} files, {self.bytes:,} bytes, all as written{more}"


def verify(config: VerifyConfig) -> VerifyReport:
    """Recomputes the checksums and counts of a model, vectors or index folder, and vectors where the model is at hand.

    Raises:
        StorageError: What is missing, damaged or miscounted, or that the folder is none of the three.
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
    damaged = list(corpus.check_folder(path, content, full=True)) or list(check_counts(path, content))
    if damaged:
        raise _damage(path, damaged)
    vectors = _recompute(_sample_of_vectors(Vectors(path, content))) if content["kind"] == "vectors" else ""
    return _report(path, content["kind"], _corpus_files(path, content), vectors, content["documents"])


def _verify_index(path: Path) -> VerifyReport:
    index = open_index(path, verify=True)  # whether its parts are those that it was made with, and what was deleted
    deleted = len(all_deleted(path, index.manifest))
    return _report(path, "index", _index_files(path), _verify_kept(path, index), len(index) - deleted, deleted)


def _index_files(path: Path) -> list[Path]:
    """Returns the files of an index, its parts and its own documents; StorageError where a count is wrong.

    Opening the index has compared the size of every array with the count in the manifest.
    """
    content = Manifest.read(path)
    ids = count_lines(path / IDS) if content.count else 0
    if ids != content.count:
        reason = f"is damaged: holds {ids:,} ids of {content.count:,} documents; rebuild the index"
        raise StorageError(path / IDS, reason)
    files = [path / corpus.MANIFEST, *(confined(path, name) for name in content.files)]
    documents = path / content.documents
    if documents.parent == path:  # a store of its own; that of a vectors folder is verified there
        store = corpus.read_manifest(documents)
        if damaged := list(check_counts(documents, store)):
            raise _damage(documents, damaged)
        files += _corpus_files(documents, store)
    for part in content.parts:
        files += _index_files(path / part["folder"])
    return files


def _verify_kept(path: Path, index: Index[Any]) -> str:
    """Computes again a sample of what an index keeps of its vectors; returns what that showed, or why it was not."""
    identity, texts = index.manifest.model, path / index.manifest.documents
    if identity is None:
        return ""
    cut = corpus.CUT in identity
    if not cut and not isinstance(index, Keeps):
        return f"no vector was computed again: an index of type {index.manifest.type} keeps none as it was"
    try:
        store = DocumentStore.open(texts)
        positions = _live_positions(min(len(index), len(store)), all_deleted(path, index.manifest))
        # The folder may have been made anew since, from another corpus; the index is none the worse for it.
        if not len(positions) or any(store.id(each) != index.ids[each] for each in positions.tolist()):
            return f"no vector was computed again: {texts} holds other documents by now"
        documents = [store.get(position) for position in positions.tolist()]
    except StorageError as error:
        return f"no vector was computed again, its texts cannot be read: {error}"
    passages, kept = some_passages(index, positions) if cut else (None, _stored(index, positions))
    vectors, terms = (None, kept) if isinstance(kept, Terms) else (kept, None)
    model = corpus.find_model(index.manifest.model_path, path)
    return _recompute(_Sample(path, model, identity, documents, vectors, terms, passages))


def _stored(index: Index[Any], positions: Positions) -> Floats | Terms:
    assert isinstance(index, Keeps), "the caller has asked"
    return index.stored(positions)


def _live_positions(count: int, deleted: Positions) -> Positions:
    """Returns some of the first `count` positions, rising: none that was deleted, which Milvus no longer has."""
    deleted = deleted[deleted < count]
    ranks = np.array(_positions(count - len(deleted)), np.int64)
    return ranks + np.searchsorted(deleted - np.arange(len(deleted)), ranks, side="right")


def _corpus_files(path: Path, content: dict[str, Any]) -> list[Path]:
    files = [path / corpus.MANIFEST, *(confined(path, name) for name in content["files"])]
    for entry in content["shards"]:
        shard = corpus.open_sidecar(path, entry)
        files += [shard.path(path, "json"), *(shard.path(path, suffix) for suffix in shard.files)]
    return files


class _Sample(NamedTuple):
    """Some documents of a folder, with what it stores of them, and what it says of how that was made."""

    folder: Path
    model: str
    identity: Mapping[str, Any]
    documents: list[Document]
    vectors: Floats | None
    terms: Terms | None
    passages: list[Passage] | None = None


def _sample_of_vectors(vectors: Vectors) -> _Sample:
    positions = _positions(vectors.count_rows())
    rows = np.array(_rows(vectors.shards(), positions), np.float32).reshape(len(positions), -1)
    terms = Terms.join(_rows(vectors.terms(), positions)) if corpus.SPARSE in vectors.identity else None
    # The manifest knows the model's folder from wherever this runs; config.toml has it as it was typed then.
    model = corpus.find_model(vectors.manifest["about"].get("model_path", ""), vectors.folder)
    passages = _passages(vectors, positions) if vectors.cut else None
    places = positions if passages is None else [passage.position for passage in passages]
    documents = [vectors.documents.get(position) for position in places]
    return _Sample(vectors.folder, model, vectors.identity, documents, rows, terms, passages)


def _passages(vectors: Vectors, rows: Sequence[int]) -> list[Passage]:
    """Returns which passages some rows are of, at rising rows."""
    found: list[Passage] = []
    start = 0
    for table in vectors.passages():
        for row in (row - start for row in rows if start <= row < start + len(table)):
            number = row - int(np.searchsorted(table[:, 0], table[row, 0]))  # a document's passages are in one shard
            found.append(Passage(int(table[row, 0]), number, (int(table[row, 1]), int(table[row, 2]))))
        start += len(table)
    return found


def _positions(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, SAMPLE).astype(int)).tolist() if count else []


def _recompute(sample: _Sample) -> str:
    """Encodes the documents of a sample again; returns what that showed, or why it could not be done.

    Raises:
        StorageError: A vector that the same model does not give.
    """
    if not sample.model:
        return "no vector was computed again: the folder names no model"
    try:
        retriever = _open_retriever(sample)
    except LlaraError as error:
        return f"no vector was computed again, its model does not open: {error}"
    if any(sample.identity.get(name) != value for name, value in retriever.identity.items()):
        return f"no vector was computed again: {sample.model} has changed since, or runs in another type"
    return _compare(sample, retriever)


def _open_retriever(sample: _Sample) -> "Retriever":
    """Opens the model with the settings that the vectors were made with; none of its own code is run."""
    from llara.retriever import Retriever
    from llara.templates import Template

    contract = sample.identity.get("contract", {})
    template = Template.from_dict(contract["template"], str(sample.folder)) if "template" in contract else None
    bos: Any = ("yes" if contract["bos"] else "no") if contract.get("causal") else "auto"
    # Other types are the device's choice, as they were then: bfloat16 is not to be had everywhere.
    made: Any = sample.identity.get("dtype")
    dtype: Any = made if made in ("float32", "int8") else "auto"
    return Retriever.for_job(ModelConfig(model=sample.model, bos=bos, dtype=dtype, offline=True), template)


def _compare(sample: _Sample, retriever: "Retriever") -> str:
    """Compares a sample with what its model gives; see `_recompute`."""
    from llara.lexical import TermOptions
    from llara.model import DTYPE_TOLERANCE

    texts, titles = _texts(sample, retriever)
    length, said = sample.identity["passage_length"], []
    if sample.terms is not None:
        settings = sample.identity[corpus.SPARSE]
        options = TermOptions(**{name: settings[name] for name in ("top_k", "expansion", "fold")})
        again, terms = retriever.encode_passages_with_terms(texts, titles, options, max_length=length)
        pairs = ((sample.terms.of(row), terms.of(row)) for row in range(len(texts)))
        apart = [terms_apart(was, now, options.top_k) for was, now in pairs]
        _refuse_apart(sample, "sparse vector", apart, DTYPE_TOLERANCE[sample.identity["dtype"]])
        said.append("sparse vectors")
    else:
        again = retriever.encode_passages(texts, titles=titles, max_length=length)
    if sample.vectors is not None:
        identity = sample.identity
        allowed = max(DTYPE_TOLERANCE[identity["dtype"]], VECTOR_TOLERANCE[identity["vector_dtype"]])
        _refuse_apart(sample, "vector", np.abs(sample.vectors - again).max(axis=1).tolist(), allowed)
        said.insert(0, "vectors")
    return f"{len(texts)} {' and '.join(said)} computed again, all the same"


def _texts(sample: _Sample, retriever: "Retriever") -> tuple[list[str], list[str]]:
    """Returns the texts and the titles that were encoded: of documents, or of passages, which are cut again."""
    if sample.passages is None:
        return [document.text for document in sample.documents], [document.title for document in sample.documents]
    from llara.encoding.encoder import open_cutter

    cutter = open_cutter(retriever, sample.identity["passage_length"], sample.identity[corpus.CUT]["overlap"])
    texts, titles = [], []
    for document, passage in zip(sample.documents, sample.passages, strict=True):
        title, spans = cutter.spans(document)
        if passage.span not in spans[passage.number : passage.number + 1]:
            reason = f"its passage {passage.number + 1} is not the one that {sample.model} cuts"
            raise StorageError(sample.folder, f"document {document.id!r}: {reason}")
        texts.append(document.text[slice(*passage.span)])
        titles.append(title)
    return texts, titles


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


def _refuse_apart(sample: _Sample, what: str, apart: Iterable[float], allowed: float) -> None:
    for document, difference in zip(sample.documents, apart, strict=True):
        if not difference <= allowed:  # also catches NaN
            reason = f"its {what} is not the one that {sample.model} gives: {difference:.2g} apart"
            raise StorageError(sample.folder, f"document {document.id!r}: {reason}, {allowed:.2g} allowed")


def _rows(shards: Iterable[Any], positions: Sequence[int]) -> list[Any]:
    """Returns the rows at rising positions: vectors, or the terms of one document each; the shards are walked once."""
    found: list[Any] = []
    start = 0
    for shard in shards:
        here = [position - start for position in positions if start <= position < start + len(shard)]
        found += [shard.part(row, row + 1) if isinstance(shard, Terms) else shard[row] for row in here]
        start += len(shard)
    return found


def _report(
    path: Path, kind: str, files: Sequence[Path], vectors: str, documents: int = 0, deleted: int = 0
) -> VerifyReport:
    size = sum(file.stat().st_size for file in files)
    return VerifyReport(path, kind, len(files), size, documents, deleted, vectors)


def _damage(path: Path, errors: Sequence[StorageError]) -> StorageError:
    if len(errors) == 1:
        return errors[0]
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    return StorageError(path, f"{len(errors)} files are damaged: " + "; ".join(map(str, errors[:SHOWN])) + more)
