import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.errors import DataError, ModelError, StorageError
from llara.index.base import Manifest
from llara.index.sparse import POSITIONS, SEGMENTS, STARTS, WEIGHTS, SparseIndex, cut
from llara.terms import Terms
from tests.index.helpers import as_terms, make_sparse
from tests.reference.ranking import order, sparse_products

Rows = list[dict[int, float]]
VOCABULARY = 60


def draw(count: int, seed: int, most: int = 12) -> Rows:
    """Sparse vectors of up to `most` terms, some of none; weights are those that float32 has."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.permutation(VOCABULARY)[: rng.integers(0, most)]
        rows.append({int(term): float(np.float32(rng.random() + 0.1)) for term in ids})
    return rows


def assert_like_reference(index: SparseIndex, queries: Rows, rows: Rows, ids: list[str], top_k: int) -> None:
    found = index.search(as_terms(queries), top_k)
    for number, query in enumerate(queries):
        scores = sparse_products(query, rows)
        expected = [each for each in order(scores, ids, top_k) if scores[each]]
        assert [each for each in found.positions[number].tolist() if each >= 0] == expected
        given = found.scores[number][: len(expected)].tolist()
        assert given == pytest.approx([scores[each] for each in expected], rel=2e-7)
        assert (found.scores[number][len(expected) :] == -np.inf).all()


@pytest.mark.parametrize("most", [1, 40, 1 << 24])  # postings of a segment: a document each, several, one segment
@pytest.mark.parametrize("top_k", [1, 10, 300])
def test_search_is_exact(tmp_path: Path, most: int, top_k: int) -> None:
    rows, ids = draw(150, 0), [f"d{(7 * number) % 150}" for number in range(150)]
    index = make_sparse(tmp_path, rows, ids, VOCABULARY, most)
    assert_like_reference(index, draw(20, 1), rows, ids, top_k)


def test_ties_are_ordered_by_id_descending_even_across_segments(tmp_path: Path) -> None:
    rows = [row for row in draw(6, 5) for _ in range(20)]
    ids = [f"d{number}" for number in np.random.default_rng(3).permutation(len(rows))]
    index = make_sparse(tmp_path, rows, ids, VOCABULARY, 50)
    assert index.manifest.settings["segments"] > 3
    for top_k in (1, 10, 33, 120):
        assert_like_reference(index, draw(10, 4), rows, ids, top_k)


def test_segments_hold_as_many_documents_as_fit() -> None:
    terms = as_terms([{1: 1.0, 2: 1.0}, {}, {3: 1.0}, dict.fromkeys(range(9), 1.0), {}, {4: 1.0}, {5: 1.0}])
    for shards in ([terms], [terms.part(row, row + 1) for row in range(7)], [terms.part(0, 4), terms.part(4, 7)]):
        parts = [Terms.join(rows) for rows in cut(shards, 3)]
        assert [np.diff(part.starts).tolist() for part in parts] == [[2, 0, 1], [9, 0], [1, 1]]
        assert Terms.join(parts).ids.tolist() == terms.ids.tolist()
    assert [len(Terms.join(rows)) for rows in cut([terms], 1000)] == [7]
    assert list(cut([Terms.of_rows([])], 3)) == []


def test_a_query_without_terms_or_with_unseen_ones_has_no_hits(tmp_path: Path) -> None:
    index = make_sparse(tmp_path, [{1: 1.0}, {2: 0.5}], ["a", "b"])
    found = index.search(as_terms([{}, {7: 1.0}, {2: 2.0, 7: 1.0}]), 2)
    assert found.positions.tolist() == [[-1, -1], [-1, -1], [1, -1]]
    assert found.scores[2].tolist() == [1.0, -np.inf]
    with pytest.raises(
        ModelError, match=r"knows 60 terms, the query has others: it was built with the model models/so"
    ):
        index.search(as_terms([{60: 1.0}]), 2)


def test_documents_without_any_term_are_no_index(tmp_path: Path) -> None:
    for rows in ([{}, {}], []):
        with pytest.raises(DataError, match="no document has a term"):
            make_sparse(tmp_path, rows, ["a", "b"][: len(rows)])


def test_the_same_vectors_give_the_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    rows, ids = draw(60, 0), [str(number) for number in range(60)]
    for name in ("one", "two"):
        make_sparse(tmp_path / name, rows, ids)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    names = {"ids.offsets.npy", "ids.txt", "manifest.json", POSITIONS, STARTS, WEIGHTS, SEGMENTS}
    assert set(digests[0]) == names


def test_a_loaded_index_is_memory_mapped(tmp_path: Path) -> None:
    index = make_sparse(tmp_path, draw(30, 0), [str(number) for number in range(30)])
    assert all(isinstance(each.base, np.memmap) for each in (index._positions, index._weights, index._starts))


def test_memory_is_that_of_a_segment(tmp_path: Path) -> None:
    import tracemalloc

    def most(documents: int) -> int:
        shard = as_terms([dict.fromkeys(range(number % 20, number % 20 + 40), 1.0) for number in range(100)])
        from llara.index.sparse import write_sparse

        tracemalloc.start()
        write_sparse(tmp_path, lambda: (shard for _ in range(documents // 100)), 60, 1 << 15)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(100)  # imports
    assert most(32_000) < 1.5 * most(4_000)


@pytest.mark.parametrize("name", [POSITIONS, STARTS, WEIGHTS, SEGMENTS, "ids.txt"])
def test_a_cut_or_changed_file_is_an_error(tmp_path: Path, name: str) -> None:
    make_sparse(tmp_path, draw(30, 0), [str(number) for number in range(30)])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-5])
    with pytest.raises(StorageError, match=f"{name}: is damaged"):
        Manifest.read(tmp_path)
    (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StorageError, match=f"{name}: is damaged"):
        Manifest.read(tmp_path, verify=True)


@pytest.mark.parametrize(
    ("name", "dtype", "number"),
    [
        *((POSITIONS, "int32", number) for number in (-1, 30, 2**31 - 1)),
        *((STARTS, "int64", number) for number in (-1, 2**40)),
        *((SEGMENTS, "int64", number) for number in (-1, 2**40)),
    ],
)
def test_numbers_that_lead_outside_the_index_are_an_error(tmp_path: Path, name: str, dtype: str, number: int) -> None:
    rows = draw(30, 0)
    make_sparse(tmp_path, rows, [str(each) for each in range(30)])
    data = (tmp_path / name).read_bytes()
    values = np.frombuffer(data[128:], dtype).copy()
    everything: Any = as_terms([dict.fromkeys(range(VOCABULARY), 1.0)])
    for at in {0, len(values) // 2, len(values) - 1}:
        changed = values.copy()
        changed[at] = number
        (tmp_path / name).write_bytes(data[:128] + changed.tobytes())
        with pytest.raises(StorageError, match=f"{name}: is damaged"):
            SparseIndex(tmp_path, Manifest.read(tmp_path)).search(everything, 3)
