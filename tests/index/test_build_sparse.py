"""The job `index --type sparse`: from a vectors folder to an index folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llara.config import IndexConfig
from llara.encoding.shards import Vectors
from llara.errors import ConfigError, StorageError
from llara.index.base import Manifest
from llara.index.build import build_index
from llara.index.opening import open_index
from llara.index.sparse import SparseIndex
from llara.terms import Terms
from tests.encoding.helpers import corpus_lines, run, run_sparse, tree, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.jsonl", corpus_lines(45))


@pytest.fixture
def vectors(tmp_path: Path, corpus: Path) -> Path:
    run_sparse(corpus, tmp_path / "vectors", about={"model_path": "org/model"})
    return tmp_path / "vectors"


def config(vectors: Path, name: str = "index", **changes: Any) -> IndexConfig:
    return IndexConfig(**{"vectors": vectors, "output": vectors.parent / name, "type": "sparse", **changes})


def test_a_sparse_index_from_vectors(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = build_index(config(vectors))
    assert "index, pass 3 of 3: 45 documents" in capsys.readouterr().err
    assert (result.type, result.documents, result.rejected, result.reused) == ("sparse", 45, 0, False)
    index = open_index(result.output, verify=True)
    assert isinstance(index, SparseIndex)
    assert index.settings == Vectors.open(vectors).sparse_settings()
    assert (index.model, index.manifest.documents, index.manifest.kind) == ("org/model", "../vectors", "sparse index")
    terms = Terms.join(list(Vectors.open(vectors).terms()))
    asked = int(np.argmax(np.diff(terms.starts)))
    found = index.search(terms.part(asked, asked + 1), 1)
    assert found.positions.tolist() == [[asked]]
    assert found.scores[0, 0] == pytest.approx(float((terms.of(asked)[1].astype(np.float64) ** 2).sum()), rel=1e-6)


def test_a_finished_index_is_left_alone_and_a_stopped_one_goes_on(vectors: Path) -> None:
    build_index(config(vectors))
    folder = vectors.parent / "index"
    whole = tree(folder)
    assert build_index(config(vectors)).reused
    (folder / "manifest.json").unlink()
    (folder / "postings.weights.npy").write_bytes(b"cut")
    (folder / ".tmp-1-segments.npy").write_bytes(b"left over")
    assert not build_index(config(vectors)).reused
    assert tree(folder) == whole


def test_vectors_without_sparse_ones_are_named_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "dense")
    with pytest.raises(
        StorageError, match="dense: holds no sparse vectors; encode the corpus with --sparse into anoth"
    ):
        build_index(config(tmp_path / "dense"))
    assert not (tmp_path / "index").exists()


def test_other_sparse_vectors_are_refused(vectors: Path, corpus: Path, tmp_path: Path) -> None:
    build_index(config(vectors))
    write_corpus(corpus, corpus_lines(46))
    run_sparse(corpus, tmp_path / "other")
    with pytest.raises(StorageError, match="index: was built from other documents or vectors"):
        build_index(config(tmp_path / "other"))
    with pytest.raises(StorageError, match='type was "sparse", is now "flat"'):
        build_index(config(vectors, type="flat"))


def test_what_a_sparse_index_is_built_from() -> None:
    with pytest.raises(ConfigError) as caught:
        IndexConfig(type="sparse", corpus=(Path("c"),), output=Path("i"))
    assert caught.value.problems == (
        "--vectors: is required for --type sparse",
        "--corpus: goes with --type bm25; a sparse index is built from --vectors",
    )


def test_damaged_vectors_are_named_and_leave_no_index(vectors: Path) -> None:
    path = vectors / "shard-00002.terms.ids.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(StorageError, match=r"shard-00002\.terms\.ids\.npy: is damaged: holds numbers that no encoder"):
        build_index(config(vectors))
    path.write_bytes(data)
    assert not build_index(config(vectors)).reused


def test_every_changed_byte_is_found_on_request(vectors: Path) -> None:
    build_index(config(vectors))
    for path in sorted((vectors.parent / "index").iterdir()):
        data = path.read_bytes()
        for at in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
            with pytest.raises(StorageError):
                open_index(vectors.parent / "index", verify=True)
        path.write_bytes(data)
    open_index(vectors.parent / "index", verify=True)


def test_the_manifest_says_how_terms_were_chosen(vectors: Path) -> None:
    build_index(config(vectors))
    manifest = Manifest.read(vectors.parent / "index")
    assert manifest.model is not None and manifest.model["sparse"]["top_k"] == 12
    content = json.loads((vectors.parent / "index" / "manifest.json").read_text())
    assert content["settings"] == {"segments": 1, "postings": Vectors.open(vectors).count_terms(), "terms": 50}
