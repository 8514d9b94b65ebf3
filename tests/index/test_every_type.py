"""What holds for every type of index, on documents and queries of its own kind."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llara.fuse import fusion
from llara.index import faiss as approximate
from llara.index.base import Allowed
from llara.index.opening import AnyIndex, open_index
from llara.ranking import Each, FusedIndex
from llara.records import Document
from llara.terms import Terms
from tests.index.helpers import as_terms, delete, join, make_bm25, make_faiss, make_flat, make_milvus, make_sparse
from tests.reference.filtering import thinned

WORDS = ("fox", "dog", "silver", "metal", "sleep", "jump")
COUNT = 90
IDS = [f"d{(7 * number) % COUNT}" for number in range(COUNT)]


class Case(NamedTuple):
    """An index over 90 documents, of which each third is the same as the one 30 before, and five queries.

    deleted: Positions of documents that were deleted.
    """

    index: AnyIndex
    queries: Any
    deleted: tuple[int, ...] = ()

    @property
    def live(self) -> int:
        return COUNT - len(self.deleted)

    def search(self, top_k: int, queries: Any = None, allowed: Allowed | None = None) -> Any:
        index: Any = self.index
        return index.search(self.queries if queries is None else queries, top_k, allowed)


def counts() -> np.ndarray[Any, Any]:
    """How often each word stands in each document, [90, 6], and in each of five queries, the last five rows."""
    rng = np.random.default_rng(0)
    documents = np.tile(rng.integers(0, 4, (30, len(WORDS))), (3, 1))
    return np.concatenate([documents, rng.integers(0, 2, (4, len(WORDS))), np.ones((1, len(WORDS)), int)])


def as_text(row: np.ndarray[Any, Any]) -> str:
    return " ".join(word for word, count in zip(WORDS, row.tolist(), strict=True) for _ in range(count))


def as_sparse(row: np.ndarray[Any, Any]) -> dict[int, float]:
    return {number: 0.1 * count for number, count in enumerate(row.tolist()) if count}


def flat(folder: Path) -> Case:
    rows = counts().astype(np.float32)
    return Case(make_flat(folder, rows[:COUNT], IDS), rows[COUNT:])


def sparse(folder: Path) -> Case:
    rows = [as_sparse(row) for row in counts()]
    return Case(make_sparse(folder, rows[:COUNT], IDS), as_terms(rows[COUNT:]))


def bm25(folder: Path) -> Case:
    rows = [as_text(row) for row in counts()]
    documents = [Document(identifier, text) for identifier, text in zip(IDS, rows[:COUNT], strict=True)]
    return Case(make_bm25(folder, documents), rows[COUNT:])


def spread() -> Any:
    """The counts as vectors of 48 dimensions with the same products: six are too few for codes."""
    turned, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((48, len(WORDS))))
    return (counts() @ turned.T).astype(np.float32)


def approximate_type(kind: str, **settings: Any) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        rows = spread()
        return Case(make_faiss(folder, rows[:COUNT], IDS, kind, **settings), rows[COUNT:])

    return make


def in_parts(make: Callable[[Path, Any, Any], Any]) -> Callable[[Path], Case]:
    """The same documents in parts, one of them without a document that was not deleted."""

    def made(folder: Path) -> Case:
        rows = counts().astype(np.float32)
        bounds = [0, 13, 40, 47, COUNT]
        parts = [
            make(folder / f"part-{number:05d}", rows[start:stop], IDS[start:stop])
            for number, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        join(folder, parts)
        gone = tuple(range(40, 47))
        return Case(delete(folder, gone), rows[COUNT:], gone)

    return made


def with_deletions(make: Callable[[Path], Case]) -> Callable[[Path], Case]:
    def made(folder: Path) -> Case:
        case = make(folder)
        gone = (0, 3, 4, 30, 58, 89)
        return Case(delete(folder, gone), case.queries, gone)

    return made


def hnsw_parts(folder: Path, rows: Any, ids: Any) -> Any:
    return make_faiss(folder, rows, ids, "hnsw")


def milvus(folder: Path) -> Case:
    pytest.importorskip("pymilvus")
    rows = counts().astype(np.float32)
    return Case(make_milvus(folder, rows[:COUNT], IDS), rows[COUNT:])


def fused(method: Any) -> Callable[[Path], Case]:
    """Vectors, sparse vectors and words, fused over all of their hits."""

    def make(folder: Path) -> Case:
        cases = [each(folder / name) for name, each in (("flat", flat), ("sparse", sparse), ("bm25", bm25))]
        index = FusedIndex([case.index for case in cases], fusion(method, (1, 0.5, 2)), COUNT)
        return Case(index, Each([case.queries for case in cases]))

    return make


TYPES = {
    "flat": flat,
    "hnsw": approximate_type("hnsw"),
    "ivfpq": approximate_type("ivfpq"),
    "ivfpq, 4 bits": approximate_type("ivfpq", pq_bits=4, nlist=3),
    "rabitq": approximate_type("rabitq", rabitq_bits=4),
    "milvus": milvus,
    "sparse": sparse,
    "bm25": bm25,
    "flat in parts": in_parts(make_flat),
    "hnsw in parts": in_parts(hnsw_parts),
    "flat with deletions": with_deletions(flat),
    "hnsw with deletions": with_deletions(approximate_type("hnsw")),
    "ivfpq with deletions": with_deletions(approximate_type("ivfpq")),
    "rabitq with deletions": with_deletions(approximate_type("rabitq", rabitq_bits=4, nlist=3)),
    "milvus with deletions": with_deletions(milvus),
    "sparse with deletions": with_deletions(sparse),
    "bm25 with deletions": with_deletions(bm25),
}


def part(queries: Any, start: int, stop: int) -> Any:
    return queries.part(start, stop) if isinstance(queries, Terms | Each) else queries[start:stop]


@pytest.fixture(autouse=True)
def nothing_is_too_small_for_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an approximate index of this size scores every document."""
    monkeypatch.setattr(approximate, "EXACT", 0)


SEARCHES = {**TYPES, "fused by rank": fused("rrf"), "fused by score": fused("relative")}


@pytest.mark.parametrize("make", SEARCHES.values(), ids=SEARCHES.keys())
class TestEveryType:
    def test_hits_fall_and_ties_are_ordered_by_id_descending(
        self, make: Callable[[Path], Case], tmp_path: Path
    ) -> None:
        case = make(tmp_path)
        ties = 0
        for scores, positions in zip(*case.search(40), strict=True):
            hits = [(score, IDS[at]) for score, at in zip(scores.tolist(), positions.tolist(), strict=True) if at >= 0]
            assert hits == sorted(hits, reverse=True)
            ties += len(hits) - len({score for score, _ in hits})
        assert ties > 20 or case.index.asks == "each"  # no two sums of ranks are the same here

    @pytest.mark.parametrize("top_k", [1, 2, 10, 31])
    def test_fewer_hits_are_the_first_of_more(self, make: Callable[[Path], Case], top_k: int, tmp_path: Path) -> None:
        case = make(tmp_path)
        for few, all_of_them in zip(case.search(top_k), case.search(COUNT), strict=True):
            assert np.array_equal(few, all_of_them[:, :top_k])

    def test_more_hits_than_documents_are_all(self, make: Callable[[Path], Case], tmp_path: Path) -> None:
        case = make(tmp_path)
        found = case.search(1000)
        assert found.scores.shape == found.positions.shape == (5, case.live)
        assert (found.scores.dtype, found.positions.dtype) == (np.float32, np.int64)
        assert ((found.positions < 0) == (found.scores == -np.inf)).all()
        for row in found.positions:
            assert len(set(row[row >= 0].tolist()) - set(case.deleted)) == (row >= 0).sum() > 0
        # An index of vectors has a score for every document, the others only for those that share a term.
        assert (found.positions >= 0).all() or case.index.asks != "vectors"

    def test_hits_do_not_depend_on_the_batch(self, make: Callable[[Path], Case], tmp_path: Path) -> None:
        case = make(tmp_path)
        together = case.search(20)
        single = [case.search(20, part(case.queries, row, row + 1)) for row in range(5)]
        for column, rows in zip(together, zip(*single, strict=True), strict=True):
            assert np.array_equal(column, np.concatenate(rows))

    @pytest.mark.parametrize(("share", "top_k"), [(0.5, 10), (0.05, 3), (0.05, 40), (0.9, 31), (0.0, 5), (1.0, 90)])
    def test_with_a_filter_hits_are_those_of_a_full_search_that_fit(
        self, make: Callable[[Path], Case], share: float, top_k: int, tmp_path: Path
    ) -> None:
        case = make(tmp_path)
        fits = np.random.default_rng(3).random(COUNT) < share
        found = case.search(top_k, allowed=Allowed.of(fits))
        fits[list(case.deleted)] = False
        assert found.scores.shape == found.positions.shape == (5, min(top_k, fits.sum()))
        assert fits[found.positions[found.positions >= 0]].all()
        if case.index.asks == "each":  # what is fused are ranks, or scores beside others, among what is allowed
            return
        every = case.search(COUNT)
        for row in range(5):
            wanted = thinned(every.positions[row].tolist(), fits.tolist(), top_k)
            assert [at for at in found.positions[row].tolist() if at >= 0] == wanted
            scores = dict(zip(every.positions[row].tolist(), every.scores[row].tolist(), strict=True))
            assert [score for score in found.scores[row].tolist() if score > -np.inf] == [scores[at] for at in wanted]

    def test_no_queries_have_no_hits(self, make: Callable[[Path], Case], tmp_path: Path) -> None:
        case = make(tmp_path)
        assert case.search(3, part(case.queries, 0, 0)).scores.shape == (0, 3)

    def test_given_documents_score_as_in_a_search(self, make: Callable[[Path], Case], tmp_path: Path) -> None:
        case = make(tmp_path)
        index: Any = case.index
        found = case.search(COUNT)
        live = np.setdiff1d(np.arange(COUNT), case.deleted)
        given = [np.random.default_rng(1).permutation(live)[:50] for _ in range(5)]
        scores = index.score(case.queries, given)
        for asked, of_asked, of_query, positions in zip(given, scores, *found, strict=True):
            known = {at: score for at, score in zip(positions.tolist(), of_query.tolist(), strict=True) if at >= 0}
            assert of_asked.tolist() == [known.get(at, 0.0) for at in asked.tolist()]
        assert [len(each) for each in index.score(case.queries, [np.empty(0, np.int64)] * 5)] == [0] * 5


@pytest.mark.parametrize("make", TYPES.values(), ids=TYPES.keys())
def test_an_index_that_is_opened_again_is_the_same(make: Callable[[Path], Case], tmp_path: Path) -> None:
    case = make(tmp_path)
    again = Case(open_index(tmp_path, verify=True), case.queries)
    assert type(again.index) is type(case.index)
    assert len(again.index) == len(case.index) == COUNT
    assert [again.index.ids[position] for position in range(COUNT)] == IDS
    for ours, theirs in zip(case.search(15), again.search(15), strict=True):
        assert np.array_equal(ours, theirs)
