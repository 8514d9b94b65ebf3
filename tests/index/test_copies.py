"""Documents with equal vectors: a graph links their vector once, and a hit stands for all of them."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.encoding.arrays import open_array, write_array
from llara.errors import StorageError
from llara.index import faiss as approximate
from llara.index.base import Allowed
from llara.index.copies import COPIES, Copies, Digests, without
from llara.index.flat import FILE
from llara.index.opening import open_index
from tests.index.helpers import make_faiss, make_flat


class Names:
    """Ids that fall as positions rise."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> str:
        return f"{self.count - position:05d}"


def numbers_of(rows: list[int]) -> tuple[list[int], dict[int, list[int]]]:
    """By definition: the number of each row's vector, and the rows of each vector."""
    known: dict[int, int] = {}
    numbers = [known.setdefault(row, len(known)) for row in rows]
    return numbers, {number: [at for at, each in enumerate(numbers) if each == number] for number in known.values()}


def table_of(rows: list[int]) -> Any:
    digests = Digests()
    for start in range(0, len(rows), 3):
        digests.look(np.float32([[row, -row] for row in rows[start : start + 3]]))
    return digests.table()


CASES = {
    "none": list(range(9)),
    "one": [0, 1, 2, 1],
    "all the same": [7] * 8,
    "in a row": [3, 3, 1, 1, 1, 2],
    "mixed": np.random.default_rng(0).integers(0, 12, 50).tolist(),
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES.keys())
class TestCopies:
    def test_each_document_has_the_vector_that_it_shares(self, rows: list[int]) -> None:
        numbers, members = numbers_of(rows)
        copies = Copies(table_of(rows), len(rows))
        assert (copies.vectors, copies.count) == (len(members), len(rows))
        assert copies.vectors_of(np.arange(len(rows))).tolist() == numbers
        firsts = copies.firsts(np.arange(-1, copies.vectors))
        assert firsts.tolist() == [-1, *(members[number][0] for number in range(copies.vectors))]

    def test_a_vector_is_allowed_where_one_of_its_documents_is(self, rows: list[int]) -> None:
        numbers, members = numbers_of(rows)
        documents = np.random.default_rng(1).random(len(rows)) < 0.4
        allowed = Copies(table_of(rows), len(rows)).allowed(Allowed.of(documents))
        assert allowed.total == len(members)
        assert set(np.flatnonzero(allowed.mask(0, allowed.total))) == {numbers[at] for at in np.flatnonzero(documents)}

    @pytest.mark.parametrize("filtered", [False, True])
    def test_hits_are_documents_in_the_order_of_their_scores_and_ids(self, rows: list[int], filtered: bool) -> None:
        _, members = numbers_of(rows)
        rng = np.random.default_rng(2)
        documents = rng.random(len(rows)) < (0.5 if filtered else 2)
        allowed = Allowed.of(documents) if filtered else None
        copies, ids = Copies(table_of(rows), len(rows)), Names(len(rows))
        chosen = np.flatnonzero(
            (copies.allowed(allowed) if allowed else Allowed.of(np.ones(copies.vectors, bool))).mask(0, copies.vectors)
        )
        top_k = min(4, int(documents.sum()))
        scores, vectors = np.full((5, len(rows)), -np.inf, np.float32), np.full((5, len(rows)), -1)
        for row in range(5):
            vectors[row, : len(chosen)] = rng.permutation(chosen)
            scores[row, : len(chosen)] = rng.integers(0, 3, len(chosen))  # two vectors may tie as well
        found = copies.documents(scores, vectors, ids, top_k, allowed)
        for row in range(5):
            hits = [
                (score, ids[at], at)
                for score, vector in zip(scores[row].tolist(), vectors[row].tolist(), strict=True)
                for at in members.get(vector, [])
                if documents[at]
            ]
            wanted = sorted(hits, reverse=True)[:top_k]
            assert found.positions[row].tolist() == [at for _, _, at in wanted]
            assert found.scores[row].tolist() == [score for score, _, _ in wanted]

    def test_rows_without_copies_move_to_the_beginning(
        self, rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("llara.index.copies._BLOCK", 4)
        vectors = np.float32([[row, -row] for row in rows])
        write_array(tmp_path / "v.npy", vectors)
        kept = without(
            tmp_path / "v.npy", open_array(tmp_path / "v.npy", "float32", vectors.shape), table_of(rows)[:, 0]
        )
        assert kept.tolist() == [[row, -row] for row in dict.fromkeys(rows)]


def test_rows_are_equal_where_all_their_bytes_are() -> None:
    digests = Digests()
    digests.look(np.float32([[1, 0], [1, -0.0], [np.nextafter(np.float32(1), 2), 0], [1, 0]]))
    assert digests.table().tolist() == [[3, 0]]


def test_a_full_disk_while_rows_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.npy"
    write_array(path, np.zeros((5, 2), np.float32))
    vectors = open_array(path, "float32", (5, 2))

    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def seek(self, _: int) -> None:
            return None

        def write(self, _: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(StorageError, match="make room"):
        without(path, vectors, np.array([1]))


def clusters(copies: int) -> np.ndarray[Any, Any]:
    """Unit vectors [600 + 3 * copies, 16], of which three have so many copies, mixed in."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((600, 16)).astype(np.float32)
    vectors = np.concatenate([vectors, np.repeat(vectors[:3], copies, axis=0)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return rng.permutation(vectors)


@pytest.fixture
def no_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "EXACT", 0)


@pytest.mark.usefixtures("no_exact_search")
def test_a_graph_finds_what_lies_around_many_copies_and_all_of_these(tmp_path: Path) -> None:
    vectors = clusters(copies=200)
    ids = [f"d{number}" for number in range(len(vectors))]
    queries = np.unique(vectors, axis=0)[:40] + 0.01
    graph = make_faiss(tmp_path / "graph", vectors, ids, "hnsw", hnsw_m=8)
    assert graph.manifest.settings["copies"] == 600
    flat = make_flat(tmp_path / "flat", vectors, ids)
    for top_k in (10, 300):
        found, true = graph.search(queries, top_k), flat.search(queries, top_k)
        shares = [
            len(set(ours) & set(theirs)) / top_k
            for ours, theirs in zip(found[1].tolist(), true[1].tolist(), strict=True)
        ]
        assert np.mean(shares) > 0.98
    positions = np.arange(len(vectors))
    assert np.array_equal(graph.stored(positions), vectors)
    for ours, theirs in zip(graph.score(queries, [positions] * 40), flat.score(queries, [positions] * 40), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.usefixtures("no_exact_search")
def test_documents_that_are_all_the_same(tmp_path: Path) -> None:
    vectors = np.ones((30, 4), np.float32)
    ids = [f"d{number:02d}" for number in range(30)]
    found = make_faiss(tmp_path, vectors, ids, "hnsw").search(vectors[:1], 12)
    assert found.positions.tolist() == [list(range(29, 17, -1))]
    few = Allowed.of(np.arange(30) % 10 == 3)
    again: Any = open_index(tmp_path)
    assert again.search(vectors[:1], 12, few).positions.tolist() == [[23, 13, 3]]


def test_without_copies_there_is_no_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    make_faiss(tmp_path, rng.standard_normal((20, 4)).astype(np.float32), [f"d{n}" for n in range(20)], "hnsw")
    assert not (tmp_path / COPIES).exists()
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "ids.txt", "ids.offsets.npy", "manifest.json"}


@pytest.mark.parametrize(
    "table", [[[0, 0]], [[3, 3]], [[3, -1]], [[5, 0]], [[-1, 0]], [[3, 0], [2, 0]], [[3, 0], [3, 1]]]
)
def test_a_table_that_names_no_copies_is_damaged(tmp_path: Path, table: list[list[int]]) -> None:
    write_array(tmp_path / COPIES, np.array(table))
    with pytest.raises(StorageError, match=r"copies.npy: is damaged: it names documents that cannot be copies"):
        Copies.open(tmp_path, len(table), 5)
    write_array(tmp_path / COPIES, np.array([[3, 2], [4, 0]]))
    assert Copies.open(tmp_path, 2, 5).vectors_of(np.arange(5)).tolist() == [0, 1, 2, 2, 0]
