"""Indexes over passages: documents by their best passage, against all passages scored and sorted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llara.config import IndexConfig
from llara.data import read_rows
from llara.encoding.manifest import CUT, SPARSE
from llara.encoding.numbers import Encoded
from llara.encoding.shards import Vectors, write_vectors
from llara.errors import StorageError
from llara.index.base import Allowed
from llara.index.build import build_index
from llara.index.change import delete_documents
from llara.index.opening import open_index
from llara.index.passages import DOCUMENTS, SPANS, PassageIndex, best_passages
from llara.records import Document
from llara.terms import Terms
from tests.index.helpers import as_terms
from tests.reference.filtering import thinned
from tests.reference.ranking import best_of_passages

COUNT, DIM, TERMS = 60, 6, 20
IDS = [f"d{(7 * number) % COUNT}" for number in range(COUNT)]


class Passages(NamedTuple):
    """The passages of documents: a vector, sparse vector and span each, and the document that each is of."""

    vectors: np.ndarray[Any, Any]
    terms: list[dict[int, float]]
    documents: list[int]
    spans: list[tuple[int, int]]


def made_up() -> Passages:
    """Between one and nine passages per document; many are the same, so that documents tie."""
    rng = np.random.default_rng(5)
    counts = rng.integers(1, 10, COUNT)
    rows = rng.integers(-3, 4, (int(counts.sum()), DIM))
    rows[rng.random(len(rows)) < 0.3] = rows[0]
    terms = [{int(t): 0.5 + int(t) % 3 for t in np.flatnonzero(rng.random(TERMS) < 0.15)} for _ in rows]
    documents = np.repeat(np.arange(COUNT), counts).tolist()
    spans = [(10 * number, 10 * number + 9) for count in counts.tolist() for number in range(count)]
    return Passages(rows.astype(np.float32), terms, documents, spans)


PASSAGES = made_up()
QUERIES = np.random.default_rng(6).integers(-2, 3, (5, DIM)).astype(np.float32)
ASKED = [{int(t): 1.0 for t in np.random.default_rng(n).choice(TERMS, 4, False)} for n in range(5)]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    corpus = folder / "corpus.tsv"
    corpus.write_text("".join(f"{name}\ttext of {name}\n" for name in IDS))

    def encode(documents: list[Document]) -> Encoded:
        numbers = [IDS.index(document.id) for document in documents]
        rows = [row for number in numbers for row in np.flatnonzero(np.array(PASSAGES.documents) == number).tolist()]
        table = [(numbers.index(PASSAGES.documents[row]), *PASSAGES.spans[row]) for row in rows]
        return Encoded(PASSAGES.vectors[rows], as_terms([PASSAGES.terms[row] for row in rows]), np.array(table))

    sparse = {"top_k": 9, "expansion": False, "fold": False, "vocabulary": TERMS}
    identity = {
        "model_fingerprint": "f",
        "dtype": "float32",
        "dim": DIM,
        "contract": {},
        CUT: {"overlap": 0},
        SPARSE: sparse,
    }
    write_vectors(folder / "vectors", read_rows([corpus]), encode, identity, DIM, "float32", 13)
    return folder / "vectors"


def build(vectors: Path, folder: Path, kind: str, **settings: Any) -> Any:
    build_index(IndexConfig(vectors=vectors, output=folder, type=kind, **settings))  # type: ignore[arg-type]
    return open_index(folder)


def flat(vectors: Path, folder: Path) -> Any:
    return build(vectors, folder, "flat")


def parted(vectors: Path, folder: Path) -> Any:
    """Several parts, and few enough documents in each that all of them are scored."""
    index = build(vectors, folder, "hnsw", part_size=30)
    assert len(index.parts) > 2
    return index


def sparse(vectors: Path, folder: Path) -> Any:
    return build(vectors, folder, "sparse")


def asked(index: Any) -> Any:
    return QUERIES if index.asks == "vectors" else as_terms(ASKED)


def twin(index: Any, row: int) -> list[tuple[int, float]]:
    """All documents of one query that are hits, best first, with their scores."""
    if index.asks == "vectors":
        scores = (PASSAGES.vectors @ QUERIES[row]).tolist()
    else:
        scores = [sum(w * each.get(t, 0.0) for t, w in ASKED[row].items()) for each in PASSAGES.terms]
    found = best_of_passages(scores, PASSAGES.documents, IDS)
    return [pair for pair in found if index.asks == "vectors" or pair[1] > 0]


@pytest.mark.parametrize("make", [flat, parted, sparse])
class TestEveryType:
    @pytest.mark.parametrize("top_k", [1, 3, 20, COUNT, 1000])
    def test_documents_come_by_their_best_passages(
        self, make: Callable[..., Any], top_k: int, vectors: Path, tmp_path: Path
    ) -> None:
        index = make(vectors, tmp_path / "index")
        found = index.search(asked(index), top_k)
        assert len(index) == len(index.ids) == COUNT and found.scores.shape == (5, min(top_k, COUNT))
        for row in range(5):
            hits = list(zip(found.positions[row].tolist(), found.scores[row].tolist(), strict=True))
            wanted = twin(index, row)[:top_k]  # of halves and whole numbers, which have no rounding
            assert [hit for hit in hits if hit[0] >= 0] == wanted
            assert [index.ids[at] for at, _ in hits if at >= 0] == [IDS[at] for at, _ in wanted]

    @pytest.mark.parametrize(("share", "top_k"), [(0.5, 7), (0.1, 20), (0.0, 3)])
    def test_with_a_filter(
        self, make: Callable[..., Any], share: float, top_k: int, vectors: Path, tmp_path: Path
    ) -> None:
        index, fits = make(vectors, tmp_path / "index"), np.random.default_rng(8).random(COUNT) < share
        for _ in range(2):  # the passages of a filter are remembered
            found = index.search(asked(index), top_k, Allowed.of(fits))
            for row in range(5):
                wanted = thinned([at for at, _ in twin(index, row)], fits.tolist(), top_k)
                assert [at for at in found.positions[row].tolist() if at >= 0] == wanted

    def test_given_documents_score_as_in_a_search(
        self, make: Callable[..., Any], vectors: Path, tmp_path: Path
    ) -> None:
        index = make(vectors, tmp_path / "index")
        given = [np.random.default_rng(n).permutation(COUNT)[: 11 * n] for n in range(5)]
        scores = index.score(asked(index), given)
        for row in range(5):
            known = dict(twin(index, row))
            assert scores[row].tolist() == [known.get(at, 0.0) for at in given[row].tolist()]

    def test_the_best_passage_of_a_hit_is_known(self, make: Callable[..., Any], vectors: Path, tmp_path: Path) -> None:
        index = make(vectors, tmp_path / "index")
        row_scores = (PASSAGES.vectors @ QUERIES[0]).tolist()
        if index.asks == "terms":
            row_scores = [sum(w * each.get(t, 0.0) for t, w in ASKED[0].items()) for each in PASSAGES.terms]
        one = asked(index)[:1] if index.asks == "vectors" else asked(index).part(0, 1)
        spans = best_passages(index, one, np.arange(COUNT))
        for document, span in enumerate(spans or ()):
            own = [at for at, each in enumerate(PASSAGES.documents) if each == document]
            assert span == PASSAGES.spans[max(own, key=lambda at: (row_scores[at], -at))]
        assert spans is not None and len(spans) == COUNT

    def test_deleted_documents_are_no_hits(self, make: Callable[..., Any], vectors: Path, tmp_path: Path) -> None:
        index = make(vectors, tmp_path / "index")
        (tmp_path / "gone").write_text("".join(f"{IDS[at]}\n" for at in range(0, COUNT, 4)))
        delete_documents(IndexConfig(output=tmp_path / "index", delete=tmp_path / "gone"))
        index = open_index(tmp_path / "index")
        found = index.search(asked(index), 9)
        for row in range(5):
            wanted = [at for at, _ in twin(index, row) if at % 4][:9]
            assert [at for at in found.positions[row].tolist() if at >= 0] == wanted


def test_words_are_those_of_whole_documents(vectors: Path, tmp_path: Path) -> None:
    index = build(vectors, tmp_path / "words", "bm25")
    assert len(index) == COUNT and best_passages(index, ["text"], np.array([0])) is None


def test_a_vectors_folder_tells_its_passages(vectors: Path) -> None:
    opened = Vectors.open(vectors, verify=True)
    assert (len(opened), opened.count_rows(), opened.cut) == (COUNT, len(PASSAGES.documents), True)
    table = np.concatenate(list(opened.passages()))
    assert table[:, 0].tolist() == PASSAGES.documents and table[:, 1:].tolist() == [
        list(each) for each in PASSAGES.spans
    ]
    assert np.array_equal(np.concatenate(list(opened.shards())), PASSAGES.vectors)
    assert len(Terms.join(list(opened.terms()))) == len(PASSAGES.documents)


@pytest.mark.parametrize("name", [DOCUMENTS, SPANS])
def test_damage_is_found(vectors: Path, tmp_path: Path, name: str) -> None:
    build(vectors, tmp_path / "index", "flat")
    path = tmp_path / "index" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(StorageError, match="is damaged"):
        open_index(tmp_path / "index")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError):
        open_index(tmp_path / "index", verify=True)
    if name == DOCUMENTS:  # a document that is not there would be looked up outside the file
        with pytest.raises(StorageError, match="it does not fit the manifest"):
            open_index(tmp_path / "index")


def test_it_opens_as_what_it_is(vectors: Path, tmp_path: Path) -> None:
    assert isinstance(build(vectors, tmp_path / "index", "flat"), PassageIndex)
