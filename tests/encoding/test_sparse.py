"""Sparse vectors in a vectors folder: what goes in comes out, and what decides them is part of the identity."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.data import parse_document, read_rows
from llara.encoding.shards import Vectors
from llara.errors import ModelError, StorageError
from llara.records import Document
from llara.terms import Terms
from tests.encoding.helpers import (
    IDENTITY,
    SPARSE,
    FakeEncoder,
    SparseEncoder,
    corpus_lines,
    run,
    run_sparse,
    terms_of,
    tree,
    write_corpus,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = corpus_lines(35)
    rows[10:20] = [b"bad"] * 10  # a shard without a document
    return write_corpus(tmp_path / "corpus.jsonl", rows)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


def documents_of(corpus: Path) -> list[Document]:
    return [parse_document(row) for row in read_rows([corpus]) if row.data != b"bad"]


def test_what_goes_in_comes_out(corpus: Path, output: Path) -> None:
    assert run_sparse(corpus, output) == (4, 25, 10, 0)
    vectors = Vectors.open(output, verify=True)
    assert vectors.sparse_settings() == vectors.identity["sparse"] == SPARSE
    shards = list(vectors.terms())
    assert [len(terms) for terms in shards] == [10, 0, 10, 5]
    assert all(isinstance(terms.ids.base, np.memmap) and not terms.ids.flags.writeable for terms in shards)
    found, row = Terms.join(shards), 0
    for document in documents_of(corpus):
        ids, weights = found.of(row)
        expected = terms_of(document)
        assert (ids.tolist(), weights.tolist()) == (expected[0].tolist(), expected[1].tolist())
        row += 1
    assert row == len(found) and vectors.count_terms() == len(found.ids) > 0
    assert min(np.diff(found.starts)) == 0, "a document without terms is among them"


def test_numpy_reads_the_files(corpus: Path, output: Path) -> None:
    run_sparse(corpus, output)
    files = {part: np.load(output / f"shard-00000.terms.{part}.npy") for part in ("starts", "ids", "weights")}
    assert {part: array.dtype.name for part, array in files.items()} == {
        "starts": "int64",
        "ids": "int32",
        "weights": "float32",
    }
    assert files["starts"][-1] == len(files["ids"]) == len(files["weights"])


def test_dense_files_are_the_same_with_and_without(corpus: Path, output: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "dense")
    run_sparse(corpus, output)
    with_terms, without = tree(output), tree(tmp_path / "dense")
    added = with_terms.keys() - without.keys()
    assert {name.partition(".")[2] for name in added} == {"terms.starts.npy", "terms.ids.npy", "terms.weights.npy"}
    differing = {name for name in without if with_terms[name] != without[name]}
    assert all(name.endswith(".json") for name in differing)


def test_a_folder_without_them_says_so(corpus: Path, output: Path) -> None:
    run(corpus, output)
    vectors = Vectors.open(output)
    for ask in (vectors.sparse_settings, vectors.count_terms, lambda: next(vectors.terms())):
        with pytest.raises(StorageError, match="vectors: holds no sparse vectors; encode the corpus with --sparse"):
            ask()


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (None, SPARSE, "sparse.top_k was not set, is now 12"),
        (SPARSE, None, "sparse.top_k was 12, is now not set"),
        (SPARSE, {**SPARSE, "top_k": 13}, "sparse.top_k was 12, is now 13"),
        (SPARSE, {**SPARSE, "expansion": True}, "sparse.expansion was false, is now true"),
    ],
)
def test_a_rerun_that_differs_is_refused(corpus: Path, output: Path, first: Any, then: Any, said: str) -> None:
    def once(sparse: Any) -> None:
        identity = IDENTITY if sparse is None else {**IDENTITY, "sparse": sparse}
        run(corpus, output, encode=FakeEncoder() if sparse is None else SparseEncoder(), identity=identity)

    once(first)
    before = tree(output)
    with pytest.raises(StorageError, match=said):
        once(then)
    assert tree(output) == before
    once(first)
    assert tree(output) == before


def test_a_corpus_that_grew_keeps_its_shards(corpus: Path, output: Path, tmp_path: Path) -> None:
    lines = corpus.read_bytes().splitlines()
    write_corpus(corpus, lines[:20])
    run_sparse(corpus, output)
    write_corpus(corpus, lines)
    assert run_sparse(corpus, output).reused_shards == 2
    run_sparse(corpus, tmp_path / "whole")
    assert tree(output) == tree(tmp_path / "whole")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(corpus: Path, output: Path, value: float) -> None:
    def broken(documents: list[Document]) -> Any:
        vectors, terms = SparseEncoder()(documents)
        terms.weights[terms.starts[3]] = value
        return vectors, terms

    assert len(terms_of(documents_of(corpus)[3])[0]), "the fourth document has a term"
    with pytest.raises(ModelError, match="1 sparse vectors hold NaN or infinity, of the documents doc3; nothing of"):
        run_sparse(corpus, output, encode=broken)
    assert not list(output.glob("shard-*"))
