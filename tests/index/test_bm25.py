import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from llara.data import read_documents, read_qrels, read_queries
from llara.errors import ConfigError, DataError, StorageError
from llara.evaluate import compare
from llara.index.base import Manifest
from llara.index.bm25 import Analyzer, Bm25Index, check_language
from llara.records import Document, Hit
from tests.index.helpers import make_bm25
from tests.reference import ranking

TEXTS = ["red fox jumps", "red red dog", "a lazy dog sleeps near another dog", "quick silver fox"]
DOCUMENTS = [Document(f"d{number}", text) for number, text in enumerate(TEXTS)]


def test_scores_by_hand(tmp_path: Path) -> None:
    documents = [Document("x", "red red dog"), Document("y", "blue dog")]
    found = make_bm25(tmp_path, documents, language="none").search(["red"], 10)
    idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
    expected = idf * 2 / (2 + 0.9 * (1 - 0.4 + 0.4 * 3 / 2.5))
    assert found.positions.tolist() == [[0, -1]]
    assert found.scores[0].tolist() == pytest.approx([expected, -math.inf])


@pytest.mark.parametrize("query", ["red fox", "dog dog red", "sleeps", "quick unknown dog"])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 1.0)])
def test_scores_against_the_slow_twin(tmp_path: Path, query: str, k1: float, b: float) -> None:
    found = make_bm25(tmp_path, DOCUMENTS, k1, b, "none").search([query], 10)
    scores = ranking.bm25(query, TEXTS, k1, b)
    expected = [
        each for each in ranking.order(np.float32(scores).tolist(), ["d0", "d1", "d2", "d3"], 10) if scores[each]
    ]
    assert [each for each in found.positions[0].tolist() if each >= 0] == expected
    assert found.scores[0][: len(expected)].tolist() == pytest.approx([scores[each] for each in expected], rel=1e-6)


def test_ties_are_ordered_by_id_descending_even_across_the_cut(tmp_path: Path) -> None:
    documents = [Document(identifier, "same words here") for identifier in ("b", "d", "a", "e", "c")]
    index = make_bm25(tmp_path, [*documents, Document("z", "other words")])
    found = index.search(["same", "same"], 3)
    assert [[index.ids[each] for each in row] for row in found.positions.tolist()] == [["e", "d", "c"]] * 2


def test_given_documents_score_as_in_a_search(tmp_path: Path) -> None:
    index, queries = make_bm25(tmp_path, DOCUMENTS), ["fox", "dog dog red", "zebra"]
    found, everywhere = index.search(queries, 4), np.arange(len(DOCUMENTS))
    for scores, of_query, positions in zip(index.score(queries, [everywhere] * 3), *found, strict=True):
        expected = {at: score for at, score in zip(positions.tolist(), of_query.tolist(), strict=True) if at >= 0}
        assert scores.tolist() == [expected.get(at, 0.0) for at in everywhere.tolist()]


def test_queries_without_a_known_word_have_no_hits(tmp_path: Path) -> None:
    found = make_bm25(tmp_path, DOCUMENTS).search(["zebra", "", "the of", "?!", "fox"], 2)
    assert found.positions[:4].tolist() == [[-1, -1]] * 4
    assert found.positions[4].tolist() == [3, 0]


def test_titles_count_and_words_are_stemmed(tmp_path: Path) -> None:
    documents = [Document("x", "Nothing of interest.", "Running foxes"), Document("y", "A fox ran.")]
    index = make_bm25(tmp_path, documents)
    assert index.search(["FOX run"], 2).positions.tolist() == [[0, 1]]
    assert Analyzer("english").terms("The foxes were running, I was not!") == ["fox", "were", "run"]


def test_documents_without_words_are_never_hits(tmp_path: Path) -> None:
    index = make_bm25(tmp_path, [Document("x", "?"), Document("y", "fox"), Document("z", "the")])
    assert index.search(["fox"], 3).positions.tolist() == [[1, -1, -1]]
    with pytest.raises(DataError, match="no word to index"):
        make_bm25(tmp_path / "empty", [Document("x", "?")])


def test_languages() -> None:
    assert Analyzer("german").terms("Die Häuser und der Hund") == ["haus", "hund"]
    assert Analyzer("finnish").terms("talossa ja") == ["talo", "ja"]  # a stemmer, but no stop words
    assert Analyzer("none").terms("The Foxes") == ["the", "foxes"]
    check_language("french")
    with pytest.raises(ConfigError, match=r"--language: unknown 'englsh' \(did you mean 'english'\?\)"):
        check_language("englsh")


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_bm25(tmp_path / name, DOCUMENTS)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {
        "ids.offsets.npy",
        "ids.txt",
        "manifest.json",
        "postings.positions.npy",
        "postings.scores.npy",
        "postings.starts.npy",
        "words.json",
    }


def test_a_loaded_index_is_memory_mapped_and_gives_the_same_hits(tmp_path: Path) -> None:
    first = make_bm25(tmp_path, DOCUMENTS)
    again = Bm25Index(tmp_path, Manifest.read(tmp_path, verify=True))
    assert all(isinstance(again._bm25.scores[name].base, np.memmap) for name in ("data", "indices", "indptr"))
    for ours, theirs in zip(first.search(["red dog"], 4), again.search(["red dog"], 4), strict=True):
        assert np.array_equal(ours, theirs)
    assert len(again) == 4


@pytest.mark.parametrize("name", ["postings.positions.npy", "postings.starts.npy", "words.json", "ids.txt"])
def test_a_cut_or_changed_file_is_an_error(tmp_path: Path, name: str) -> None:
    make_bm25(tmp_path, DOCUMENTS)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-5])
    with pytest.raises(StorageError, match=f"{name}: is damaged"):
        Manifest.read(tmp_path)
    (tmp_path / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StorageError, match=f"{name}: is damaged"):
        Manifest.read(tmp_path, verify=True)


def test_positions_outside_the_index_are_an_error(tmp_path: Path) -> None:
    make_bm25(tmp_path, DOCUMENTS)
    path = tmp_path / "postings.positions.npy"
    data = bytearray(path.read_bytes())
    data[128:] = b"\x7f" * (len(data) - 128)
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"postings.positions.npy: is damaged"):
        Bm25Index(tmp_path, Manifest.read(tmp_path)).search(["red dog"], 3)


def test_scifact(tmp_path: Path, shared: Path) -> None:
    folder = shared / "data" / "scifact"
    index = make_bm25(tmp_path, list(read_documents([folder])))
    queries = read_queries(folder, "test")
    found = index.search([query.text for query in queries], 100)
    run = {
        query.id: [
            Hit(query.id, index.ids[position], rank, score)
            for rank, (score, position) in enumerate(zip(scores, positions, strict=True), 1)
            if position >= 0
        ]
        for query, scores, positions in zip(queries, found.scores.tolist(), found.positions.tolist(), strict=True)
    }
    means = compare({"bm25": run}, read_qrels(folder, "test"), ["nDCG@10", "R@100"]).means["bm25"]
    assert len(queries) == 300
    assert means["nDCG@10"] == pytest.approx(0.676, abs=0.0015)
    assert means["R@100"] == pytest.approx(0.913, abs=0.0015)
