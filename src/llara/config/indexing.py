"""The configuration of an index: its type, the parameters of each, and changes to one."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llara.config.base import SEED_MAX, JobConfig

# The settings that decide the content of an index, by the types that read them.
READ_BY = {
    ("bm25",): ("k1", "b", "language"),
    ("hnsw",): ("hnsw_m", "ef_construction"),
    ("ivfpq",): ("pq_m", "pq_bits"),
    ("rabitq",): ("rabitq_bits",),
    ("ivfpq", "rabitq"): ("nlist",),
    ("hnsw", "ivfpq", "rabitq"): ("part_size", "seed"),
    ("milvus",): ("uri", "collection", "milvus_index"),
}
SCHEMES = ("http", "https", "tcp", "unix")  # of the addresses that Milvus' client knows


@dataclass(frozen=True, kw_only=True)
class IndexConfig(JobConfig):
    """Build a searchable index."""

    output: Path
    """The index folder."""
    vectors: Path | None = None
    """Vectors folder to build from."""
    corpus: tuple[Path, ...] = ()
    """Corpus to build from, for bm25 without a vectors folder."""
    type: Literal["flat", "hnsw", "ivfpq", "rabitq", "milvus", "sparse", "bm25"] = "flat"
    """flat: exact inner product over vectors. hnsw: a graph over them, mapped. ivfpq, rabitq: codes in lists, least
    memory, and fastest with --pq-bits 4. milvus: vectors in Milvus. sparse: exact over sparse vectors (encode
    --sparse). bm25: words, no model."""
    hnsw_m: int = 32
    """hnsw: links per vector; documents with equal ones share them."""
    ef_construction: int = 100
    """hnsw: candidates that the search for a vector's links keeps."""
    nlist: int | None = None
    """ivfpq, rabitq: lists that the vectors are divided into; default: about four times the root of their number."""
    pq_m: int | None = None
    """ivfpq: pieces that a vector is cut into; default: one for four dimensions, 128 at most; with 4 bits or
    fewer, one for two dimensions, 256 at most."""
    pq_bits: int | None = None
    """ivfpq: bits of a piece's code; 4 is searched several times faster, with the codes in memory; default: 8."""
    rabitq_bits: int = 1
    """rabitq: bits per dimension."""
    part_size: int | None = None
    """hnsw, ivfpq, rabitq: documents that are indexed together, in memory; default: what 2 GB hold. A larger index is
    made of several parts, cut between shards, which a search goes through one after the other."""
    seed: int = 42
    """hnsw, ivfpq, rabitq: seed of the samples and of the graph's levels."""
    uri: str | None = None
    """milvus: a path that ends in .db (Milvus Lite), or the address of a cluster, whose token or user:password is read
    from the environment variable MILVUS_TOKEN; default: milvus.db in the index folder."""
    collection: str | None = None
    """milvus: name of the collection; default: one of its own for each index folder."""
    milvus_index: Literal["AUTOINDEX", "FLAT", "HNSW"] = "AUTOINDEX"
    """milvus: how Milvus searches the vectors; FLAT is exact."""
    add: bool = False
    """Add the documents that the vectors, or the corpus of a bm25 index, have got at their end since; the index has its
    type."""
    delete: Path | None = None
    """Delete documents from the index at --output: a file with one id on each line."""
    k1: float = 0.9
    """BM25: how fast repeated words saturate."""
    b: float = 0.4
    """BM25: how much long documents are held back."""
    language: str = "english"
    """BM25: language of the stemmer and the stop words."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        numbers = [*self._at_least(0, "k1"), *self._within(0, 1, "b"), *self._within(0, SEED_MAX, "seed")]
        numbers += [*self._at_least(2, "hnsw_m"), *self._at_least(1, "ef_construction", "nlist", "pq_m", "part_size")]
        numbers += [*self._within(1, 12, "pq_bits"), *self._within(1, 9, "rabitq_bits")]
        if self.add or self.delete is not None:
            return [*super().problems(), *self._change_problems()]
        return [
            *super().problems(),
            *numbers,
            *self._type_problems(),
            *self._milvus_problems(),
            *self._source_problems(),
        ]

    def _type_problems(self) -> list[str]:
        """A setting goes with the types that read it."""
        return [
            problem
            for types, names in READ_BY.items()
            for problem in self._only_with(self.type in types, f"--type {' or '.join(types)}", *names)
        ]

    def _milvus_problems(self) -> list[str]:
        problems = []
        if self.collection is not None and not re.fullmatch(r"[A-Za-z_]\w{0,254}", self.collection, re.ASCII):
            problems.append("--collection: takes letters, digits and underscores, and does not start with a digit")
        if self.uri is not None and "://" not in self.uri and not self.uri.endswith(".db"):
            problems.append("--uri: a file of Milvus Lite ends in .db, an address begins with http:// or https://")
        scheme = (self.uri or "").partition("://")[0]
        if self.uri is not None and "://" in self.uri and scheme not in SCHEMES:
            problems.append(f"--uri: {scheme}:// is no address of Milvus, which begins with http:// or https://")
        if self.uri is not None and "@" in self.uri.partition("://")[2]:
            problems.append("--uri: holds a user or password; put user:password into the variable MILVUS_TOKEN")
        return problems

    def _change_problems(self) -> list[str]:
        """A change is made to an index as it was built."""
        flag = "--add" if self.add else "--delete"
        names: tuple[str, ...] = (
            "type",
            "k1",
            "b",
            "language",
            "hnsw_m",
            "ef_construction",
            "nlist",
            "pq_m",
            "pq_bits",
            "rabitq_bits",
        )
        names += ("part_size", "seed", "uri", "collection", "milvus_index")
        problems = self._only_with(False, f"a new index, not with {flag}", *names)
        if self.delete is not None and (self.add or self.vectors is not None or self.corpus):
            problems.append("--delete: goes with --output alone, the index")
        if self.delete is None and (self.vectors is None) == (not self.corpus):
            problems.append("--vectors or --corpus: --add needs exactly one of the two")
        return problems

    def _source_problems(self) -> list[str]:
        problems = []
        if self.type != "bm25" and self.vectors is None:
            problems.append(f"--vectors: is required for --type {self.type}")
        if self.type != "bm25" and self.corpus:
            problems.append(f"--corpus: goes with --type bm25; a {self.type} index is built from --vectors")
        if self.type == "bm25" and (self.vectors is None) == (not self.corpus):
            problems.append("--vectors or --corpus: --type bm25 needs exactly one of the two")
        return problems
