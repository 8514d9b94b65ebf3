from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.errors import ModelError, StorageError
from llara.files import check_file
from llara.index.base import Manifest
from llara.index.flat import FILE, FlatIndex
from tests.index.helpers import make_flat
from tests.reference.ranking import inner_products, order


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray[Any, Any]:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_like_reference(index: FlatIndex, queries: Any, vectors: Any, ids: list[str], top_k: int) -> None:
    found = index.search(queries, top_k)
    for row, query in enumerate(queries):
        scores = inner_products(query, vectors)
        expected = order(scores, ids, top_k)
        assert found.positions[row].tolist() == expected
        assert found.scores[row].tolist() == pytest.approx([scores[each] for each in expected], rel=2e-7, abs=1e-9)


@pytest.mark.parametrize("queries", [1, 19, 40])  # FAISS takes another way from 20 queries on
def test_search_is_exact(tmp_path: Path, queries: int) -> None:
    vectors, ids = unit(300, 24), [f"d{(7 * number) % 300}" for number in range(300)]
    assert_like_reference(make_flat(tmp_path, vectors, ids), unit(queries, 24, 1), vectors, ids, 10)


def test_given_documents_score_as_in_a_search(tmp_path: Path) -> None:
    index, queries = make_flat(tmp_path, unit(50, 12), [f"d{n}" for n in range(50)]), unit(3, 12, 1)
    found = index.search(queries, 50)
    scores = index.score(queries, list(found.positions[:, ::-5]))
    assert [each.tolist() for each in scores] == found.scores[:, ::-5].tolist()
    assert [len(each) for each in index.score(queries, [np.empty(0, np.int64)] * 3)] == [0, 0, 0]


def test_ties_are_ordered_by_id_descending_even_across_the_cut(tmp_path: Path) -> None:
    vectors = np.repeat(unit(6, 16), 30, axis=0)
    ids = [f"d{number}" for number in np.random.default_rng(3).permutation(180)]
    index = make_flat(tmp_path, vectors, ids)
    for top_k in (1, 10, 45, 180):
        assert_like_reference(index, unit(25, 16, 4), vectors, ids, top_k)


def test_all_scores_equal(tmp_path: Path) -> None:
    vectors, ids = np.zeros((200, 8), np.float32), [f"{number:03}" for number in range(200)]
    found = make_flat(tmp_path, vectors, ids).search(unit(2, 8), 3)
    assert found.positions.tolist() == [[199, 198, 197]] * 2
    assert found.scores.tolist() == [[0.0] * 3] * 2


def test_result_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    vectors, queries = unit(500, 48), unit(60, 48, 1)
    index = make_flat(tmp_path, vectors, [str(number) for number in range(500)])
    together = index.search(queries, 20)
    single = [index.search(query[None], 20) for query in queries]
    assert np.array_equal(together.scores, np.concatenate([each.scores for each in single]))
    assert np.array_equal(together.positions, np.concatenate([each.positions for each in single]))
    assert together.scores.dtype == np.float32 and together.positions.dtype == np.int64


def test_vectors_of_any_length_and_float16(tmp_path: Path) -> None:
    vectors = (unit(90, 12) * np.linspace(0.01, 1000, 90)[:, None]).astype(np.float16)
    ids = [str(number) for number in range(90)]
    index = make_flat(tmp_path, vectors, ids)
    assert_like_reference(index, 50 * unit(5, 12, 1), vectors.astype(np.float32), ids, 30)


def test_top_k_beyond_the_index_gives_all(tmp_path: Path) -> None:
    found = make_flat(tmp_path, unit(5, 4), list("abcde")).search(unit(2, 4, 1), 1000)
    assert found.positions.shape == (2, 5)
    assert [sorted(row) for row in found.positions.tolist()] == [[0, 1, 2, 3, 4]] * 2


def test_no_queries(tmp_path: Path) -> None:
    assert make_flat(tmp_path, unit(5, 4), list("abcde")).search(np.empty((0, 4), np.float32), 3).scores.shape == (0, 3)


def test_file_is_what_faiss_writes_and_is_memory_mapped(tmp_path: Path) -> None:
    import faiss

    vectors = unit(64, 16)
    index = make_flat(tmp_path, vectors, [str(number) for number in range(64)])
    own = faiss.IndexFlatIP(16)
    own.add(vectors)
    assert (tmp_path / FILE).read_bytes() == faiss.serialize_index(own).tobytes()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    path = str(tmp_path / FILE)
    mapped = sum(path in line for line in maps.read_text().splitlines())
    assert mapped == 1  # numpy looks into the mapping of FAISS
    del index


@pytest.mark.parametrize("queries", [np.zeros((2, 5), np.float32), np.zeros(4, np.float32)])
def test_queries_of_another_dimension(tmp_path: Path, queries: Any) -> None:
    index = make_flat(tmp_path, unit(5, 4), list("abcde"))
    with pytest.raises(ModelError, match=r"dimension 4, the queries are .*built with the model models/somewhere"):
        index.search(queries, 3)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vectors = unit(5, 4)
    index = make_flat(tmp_path / "good", vectors, list("abcde"))
    with pytest.raises(ModelError, match="not finite"):
        index.search(np.full((1, 4), np.nan, np.float32), 3)
    vectors[3, 1] = np.nan
    with pytest.raises(StorageError, match="not finite"):
        make_flat(tmp_path / "bad", vectors, list("abcde"))
    assert not (tmp_path / "bad" / FILE).exists()


@pytest.mark.parametrize("keep", [0, 20, 45, 60, 364])
def test_a_cut_file_is_an_error(tmp_path: Path, keep: int) -> None:
    make_flat(tmp_path, unit(5, 16), list("abcde"))
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:keep])
    with pytest.raises(StorageError, match=r"index.faiss: is damaged: has \d+ bytes where 365 were written"):
        Manifest.read(tmp_path)


def test_a_changed_byte_in_the_header_is_an_error_and_never_a_signal(tmp_path: Path) -> None:
    make_flat(tmp_path, unit(5, 16), list("abcde"))
    data = (tmp_path / FILE).read_bytes()
    manifest = Manifest.read(tmp_path)
    for at in range(45):
        changed = bytearray(data)
        changed[at] ^= 0x41
        (tmp_path / FILE).write_bytes(changed)
        with pytest.raises(StorageError, match=r"index.faiss: is damaged: its header"):
            FlatIndex(tmp_path, manifest)


def test_a_changed_byte_in_the_vectors_is_found_on_request(tmp_path: Path) -> None:
    make_flat(tmp_path, unit(5, 16), list("abcde"))
    data = bytearray((tmp_path / FILE).read_bytes())
    data[200] ^= 1
    (tmp_path / FILE).write_bytes(data)
    manifest = Manifest.read(tmp_path)
    assert len(FlatIndex(tmp_path, manifest)) == 5
    with pytest.raises(StorageError, match="SHA-256"):
        Manifest.read(tmp_path, verify=True)
    with pytest.raises(StorageError, match="SHA-256"):
        check_file(tmp_path / FILE, manifest.files[FILE], full=True)
