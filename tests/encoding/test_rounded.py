"""Vectors that are stored as 8-bit integers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.encoding.numbers import round_vectors
from llara.encoding.shards import Vectors
from llara.errors import StorageError
from tests.encoding.helpers import DIM, corpus_lines, run, tree, vector_of, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", corpus_lines(25))


def test_each_vector_is_rounded_by_its_own_largest_number(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors"
    run(corpus, output, vector_dtype="int8")
    stored = np.load(output / "shard-00000.npy")
    assert (stored.shape, stored.dtype) == ((10, DIM), np.int8)
    assert (np.abs(stored).max(axis=1) == 127).all()
    vectors = Vectors.open(output, verify=True)
    found = np.concatenate(list(vectors.shards()))
    assert found.dtype == np.float32
    exact = np.array([vector_of(document) for document in vectors.documents.iter_documents()], np.float32)
    assert (np.abs(found - exact) <= np.abs(exact).max(axis=1, keepdims=True) / 254 * 1.0001).all()
    assert np.abs(found - exact).max() > 0


def test_a_second_run_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "one", vector_dtype="int8")
    before = tree(tmp_path / "one")
    assert run(corpus, tmp_path / "one", vector_dtype="int8").reused_shards == 3
    assert tree(tmp_path / "one") == before


def test_a_damaged_scale_is_found(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors"
    run(corpus, output, vector_dtype="int8")
    path = output / "shard-00001.scales.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(StorageError, match=r"shard-00001\.scales\.npy: is damaged: has \d+ bytes"):
        Vectors.open(output)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match=r"shard-00001\.scales\.npy: is damaged: its SHA-256"):
        Vectors.open(output, verify=True)


@pytest.mark.parametrize("vectors", [np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32)])
def test_vectors_of_zeros_stay_zeros(vectors: Any) -> None:
    rounded, scales = round_vectors(vectors)
    assert (rounded.shape, scales.shape) == (vectors.shape, (len(vectors),))
    assert not (rounded * scales[:, None]).any()
