"""Cuts files and flips bits in them, and reads every kind of folder as its users do.

To cover another kind of folder, add what makes it and what reads it to `KINDS`; every type of index that `llara index`
builds is there by itself.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints
from unittest import mock

import numpy as np

from llara.config import IndexConfig, VerifyConfig
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import CUT, SPARSE
from llara.encoding.numbers import Encoded
from llara.encoding.shards import Vectors
from llara.errors import LlaraError
from llara.index import faiss
from llara.index.build import build_index
from llara.index.opening import open_index
from llara.records import Document
from llara.terms import Terms
from llara.verify import verify
from tests.encoding.helpers import IDENTITY, corpus_lines, run, run_sparse, vector_of, write_corpus
from tests.index.helpers import as_terms

ROWS, SHARD_SIZE = 90, 45
EXTRAS = {"config.toml": b"".join(b"setting_%d = %d\n" % (number, number) for number in range(60))}
EDGE = 256  # bytes at either end of a file where it is cut at every one


def cut_offsets(size: int, seed: str, count: int, edge: int = EDGE) -> list[int]:
    """Returns where a file of `size` bytes is cut: within `edge` bytes of its ends, and at `count` places between."""
    edges = {*range(min(edge, size)), *range(max(size - edge, 0), size)}
    between = sorted(set(range(size)) - edges)
    return sorted(edges | set(random.Random(seed).sample(between, min(count, len(between)))))


def bit_flips(size: int, seed: str, count: int) -> list[tuple[int, int]]:
    """Returns `count` distinct places of a single bit, as byte and bit; all of them where a file has no more."""
    bits = random.Random(seed).sample(range(8 * size), min(count, 8 * size))
    return [divmod(bit, 8) for bit in bits]


def flipped(content: bytes, place: tuple[int, int]) -> bytes:
    """Returns the content with one bit changed."""
    changed = bytearray(content)
    changed[place[0]] ^= 1 << place[1]
    return bytes(changed)


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Puts a file with other content in the place of one, for the time of the block."""
    good = path.read_bytes()
    try:
        # A new file, as a copy from elsewhere would be; the old one may still be mapped.
        path.unlink()
        path.write_bytes(content)
        yield
    finally:
        path.unlink()
        path.write_bytes(good)


def complaint(path: Path, content: bytes, read: Callable[[], None]) -> str:
    """Returns the error that reading gives while a file has other content; empty where nothing was noticed."""
    with replaced(path, content):
        try:
            read()
        except LlaraError as error:
            return str(error)
    return ""


class Kind(NamedTuple):
    """A kind of folder.

    `make` makes one in a folder with `corpus.jsonl` and `vectors`; `open` opens it, with checksums where the flag says
    so; `use` reads all that is in it.
    """

    make: Callable[[Path], Path]
    open: Callable[[Path, bool], Any]
    use: Callable[[Path, Any], None]

    def read(self, folder: Path, verify: bool) -> None:
        """Opens a folder and reads all that is in it."""
        self.use(folder, self.open(folder, verify))

    def verify(self, folder: Path) -> None:
        """Does what `llara verify` does."""
        verify(VerifyConfig(path=folder))


def make_sources(folder: Path) -> Path:
    """Makes a corpus and its vectors with sparse ones; every kind of folder can be made of these.

    Two rows are bad, and two documents the same but for their ids.
    """
    rows = corpus_lines(ROWS)
    rows[3], rows[50] = b"bad", rows[49]
    rows[61] = rows[59].replace(b'"doc59"', b'"doc61"')
    run_sparse(write_corpus(folder / "corpus.jsonl", rows), folder / "vectors", SHARD_SIZE, extras=EXTRAS)
    return folder


def make_rounded(folder: Path) -> Path:
    """Makes vectors of 8-bit integers, which have a file of scales."""
    run(folder / "corpus.jsonl", folder / "rounded", SHARD_SIZE, vector_dtype="int8", extras=EXTRAS)
    return folder / "rounded"


def make_cut(folder: Path) -> Path:
    """Makes vectors of documents that were cut into two passages each."""

    def encode(documents: list[Document]) -> Encoded:
        halves = [(0, len(each.text) // 2, len(each.text)) for each in documents]
        table = [(number, *half) for number, ends in enumerate(halves) for half in itertools.pairwise(ends)]
        vectors = [np.float32(vector_of(documents[number])) + start for number, start, _ in table]
        return Encoded(np.stack(vectors), passages=np.array(table, np.int64))

    identity = {**IDENTITY, CUT: {"overlap": 0}}
    if not (folder / "cut").exists():
        run(folder / "corpus.jsonl", folder / "cut", SHARD_SIZE, encode=encode, identity=identity, extras=EXTRAS)
    return folder / "cut"


def make_passages(folder: Path) -> Path:
    """Makes an index of passages."""
    build_index(IndexConfig(vectors=make_cut(folder), output=folder / "passages"))
    return folder / "passages"


def use_vectors(folder: Path, vectors: Vectors) -> None:
    """Reads every vector, term and document."""
    for shard in vectors.shards():
        shard.sum()
    for table in vectors.passages() if vectors.cut else ():
        table.sum()
    for terms in vectors.terms() if SPARSE in vectors.identity else ():
        Terms.join([terms.part(row, row + 1) for row in range(len(terms))])
    read_documents(vectors.documents)


def read_documents(store: DocumentStore) -> None:
    """Reads every document, by position and by id."""
    for position, document in enumerate(store.iter_documents()):
        store.find(document.id)
        assert store.get(position) == document
    store.ids()


def use_index(folder: Path, index: Any) -> None:
    """Searches an index, scores all documents, and reads all ids; then the documents, where they are its own."""
    queries = queries_for(index)
    for exact in (faiss.EXACT, 0):  # with 0, an approximate index of few documents is searched as a large one is
        with mock.patch.object(faiss, "EXACT", exact):
            for top_k in (3, len(index)):
                index.search(queries, top_k)
    index.score(queries, [np.arange(len(index))] * len(queries))
    for position in range(len(index)):
        index.ids[position]
    if (documents := folder / index.manifest.documents).parent == folder:
        read_documents(DocumentStore.open(documents))


def queries_for(index: Any) -> Any:
    """Returns three queries of the form that an index asks for."""
    if index.asks == "texts":
        return ["Text Größe", "title 1 3 5", "漢字 text text"]
    if index.asks == "terms":
        return as_terms([{number: 0.5 + number for number in range(start, 50, 3)} for start in range(3)])
    dim = int(index.manifest.settings["dim"])
    return np.random.default_rng(0).standard_normal((3, dim)).astype(np.float32)


def index_types() -> tuple[str, ...]:
    """Returns every type that `llara index` builds from files of its own; what Milvus keeps has no checksum of ours."""
    return tuple(kind for kind in get_args(get_type_hints(IndexConfig)["type"]) if kind != "milvus")


def make_index(kind: str) -> Callable[[Path], Path]:
    """Returns what makes an index of a type, from the vectors, or from the corpus where it needs words alone."""

    def make(folder: Path) -> Path:
        source: dict[str, Any] = {"corpus": (folder / "corpus.jsonl",)} if kind == "bm25" else {}
        source = source or {"vectors": folder / "vectors"}
        build_index(IndexConfig(**source, type=kind, output=folder / kind))  # type: ignore[arg-type]
        return folder / kind

    return make


def open_any_index(folder: Path, verify: bool) -> Any:
    """Opens an index of any type."""
    return open_index(folder, verify=verify)


KINDS = {
    "vectors": Kind(lambda folder: folder / "vectors", Vectors.open, use_vectors),
    "rounded": Kind(make_rounded, Vectors.open, use_vectors),
    "cut": Kind(make_cut, Vectors.open, use_vectors),
    "passages": Kind(make_passages, open_any_index, use_index),
    **{kind: Kind(make_index(kind), open_any_index, use_index) for kind in index_types()},
}


def files_of(folder: Path) -> list[str]:
    """Returns the files of a folder by name; of several shards those of the first stand for all."""
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if "shard-" not in name or "shard-00000" in name]
