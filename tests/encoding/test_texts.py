"""Texts by id for jobs that are handed a corpus: a store that is there already, or one made for the job."""

from pathlib import Path

import pytest

from llara.config import IndexConfig
from llara.data import read_documents, read_rows
from llara.encoding.shards import write_documents
from llara.encoding.texts import open_texts
from llara.errors import DataError, StorageError
from llara.index.build import build_index
from tests.encoding.helpers import corpus_lines, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", corpus_lines(20))


def test_every_kind_of_corpus_gives_the_same_texts(corpus: Path, tmp_path: Path) -> None:
    expected = {document.id: document for document in read_documents([corpus])}
    write_documents(tmp_path / "store", read_rows([corpus]))
    build_index(IndexConfig(type="bm25", corpus=(corpus,), output=tmp_path / "index"))
    for given in (corpus, tmp_path / "store", tmp_path / "index"):
        assert open_texts([given], tmp_path / "made").get_all(list(expected)) == expected
    assert (tmp_path / "made" / "manifest.json").exists()  # made once, for the file
    assert open_texts([corpus], tmp_path / "made").get_all(["nowhere"]) == {}


def test_the_first_bad_row_stops_it(corpus: Path, tmp_path: Path) -> None:
    with corpus.open("a") as file:
        file.write('{"_id": "x", "text": " "}\n{"text": "no id"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:21: empty passage"):
        open_texts([corpus], tmp_path / "made")


def test_a_folder_that_is_not_complete(corpus: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "store", read_rows([corpus]))
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("complete", "encoding"))
    with pytest.raises(StorageError, match=r"manifest\.json: is damaged"):
        open_texts([tmp_path / "store"], tmp_path / "made")
