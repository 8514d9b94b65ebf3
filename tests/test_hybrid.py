"""Several indexes of one corpus searched at once, with a tiny model whose head speaks of its own vocabulary."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llara.cli import main
from llara.config import EncodeConfig, FuseConfig, IndexConfig, MineConfig, SearchConfig
from llara.data import read_run
from llara.encoding.encode import encode
from llara.encoding.shards import Vectors
from llara.errors import ConfigError, ModelError, StorageError
from llara.fuse import fuse
from llara.index.build import build_index
from llara.index.opening import open_index
from llara.index.sparse import SparseIndex
from llara.lexical import TermOptions, TermReader
from llara.mine import mine
from llara.model import EmbeddingModel
from llara.retriever import Retriever
from llara.search import search
from llara.terms import Terms
from tests import tiny

TEXTS = [*tiny.TEXT, "A cat reads the sky.", "Numbers and vectors", "short", "漢字", "The last line of a short file"]
QUERIES = [
    "why is the sky blue because air scatters light",
    "read a file line by line, and close the file",
    "vectors of numbers: a model turns text into numbers",
]
Made = dict[str, Path]


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"_id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model, vectors of both kinds, an index of each type, and a file of queries."""
    root = tmp_path_factory.mktemp("hybrid")
    tiny.model(seed=6).save(root / "model")  # one whose head gives many tokens of these texts a logit above 0
    corpus = write_corpus(root / "corpus.jsonl", TEXTS)
    (root / "queries.tsv").write_text("".join(f"q{n}\t{query}\n" for n, query in enumerate(QUERIES)))
    vectors = root / "vectors"
    encode(EncodeConfig(model=str(root / "model"), corpus=(corpus,), output=vectors, shard_size=4, sparse=True))
    for kind in ("flat", "sparse"):
        build_index(IndexConfig(vectors=vectors, output=root / kind, type=kind))  # type: ignore[arg-type]
    build_index(IndexConfig(corpus=(corpus,), output=root / "bm25", type="bm25"))
    return {path.name.partition(".")[0]: path for path in root.iterdir()}


def model_of(made: Made) -> EmbeddingModel:
    return Retriever.load(str(made["model"])).model


def run_of(made: Made, output: Path, index: str, *hybrid: str, **changes: Any) -> dict[str, list[Any]]:
    paths = {"index": made[index], "hybrid": tuple(made[each] for each in hybrid)}
    search(SearchConfig(**paths, queries=made["queries"], output=output, **changes))
    return read_run(output)


def test_the_terms_of_a_corpus_are_those_that_its_model_says(made: Made) -> None:
    stored = Terms.join(list(Vectors.open(made["vectors"], verify=True).terms()))
    reader = TermReader(model_of(made), TermOptions(top_k=128, expansion=False))
    vectors, expected = reader.encode(TEXTS, "passage")
    assert stored.starts.tolist() == expected.starts.tolist() and len(stored.ids) > len(TEXTS)
    for row in range(len(TEXTS)):
        ours, theirs = (
            dict(zip(*(part.tolist() for part in each.of(row)), strict=True)) for each in (stored, expected)
        )
        assert ours == pytest.approx(theirs, abs=1e-5)
    dense = [row for shard in Vectors.open(made["vectors"]).shards() for row in shard.tolist()]
    assert dense == [pytest.approx(row, abs=1e-5) for row in vectors.tolist()]
    vocabulary = len(model_of(made).tokenizer)
    settings = {"top_k": 128, "expansion": False, "fold": False, "vocabulary": vocabulary}
    assert Vectors.open(made["vectors"]).sparse_settings() == settings


def test_a_sparse_search_scores_what_next_says_against_what_self_said(made: Made, tmp_path: Path) -> None:
    run = run_of(made, tmp_path / "run", "sparse")
    assert [len(run[f"q{number}"]) for number in range(3)] == [4, 5, 7]
    reader = TermReader(model_of(made), TermOptions(top_k=128, expansion=False))
    documents, queries = (reader.encode(texts, side)[1] for texts, side in ((TEXTS, "passage"), (QUERIES, "query")))  # type: ignore[arg-type]
    rows = [dict(zip(*(part.tolist() for part in documents.of(row)), strict=True)) for row in range(len(TEXTS))]
    for number in range(len(QUERIES)):
        query = zip(*(part.tolist() for part in queries.of(number)), strict=True)
        weights = dict(query)
        scores = {
            f"d{at}": sum(weight * row.get(term, 0.0) for term, weight in weights.items())
            for at, row in enumerate(rows)
        }
        expected = {document: score for document, score in scores.items() if score}
        assert {hit.document_id: hit.score for hit in run.get(f"q{number}", [])} == pytest.approx(expected, rel=1e-4)


def test_one_pass_gives_both_vectors_of_a_query(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    trunk = EmbeddingModel.trunk
    alone = {kind: run_of(made, tmp_path / kind, kind) for kind in ("flat", "sparse")}

    def watched(self: EmbeddingModel, **inputs: Any) -> Any:
        rows.append(len(inputs["input_ids"]))
        return trunk(self, **inputs)

    reader = Retriever.load(str(made["model"]))
    monkeypatch.setattr(Retriever, "for_job", lambda *_: reader)
    monkeypatch.setattr(EmbeddingModel, "trunk", watched)
    both = run_of(made, tmp_path / "both", "flat", "sparse", "bm25")
    assert sum(rows) == len(QUERIES)
    assert both.keys() == alone["flat"].keys()


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (("flat", "bm25"), {}),
        (("flat", "sparse"), {"method": "relative"}),
        (("flat", "sparse", "bm25"), {"weights": (1.0, 0.5, 2.0), "k": 10.0}),
        (("bm25", "sparse", "flat"), {"method": "relative", "weights": (1.0, 0.0, 2.0), "top_k": 4}),
    ],
)
def test_a_hybrid_run_is_the_fusion_of_single_ones(
    made: Made, names: tuple[str, ...], settings: dict[str, Any], tmp_path: Path
) -> None:
    depth = 5
    hybrid = run_of(made, tmp_path / "hybrid", *names, depth=depth, **settings)
    for name in names:
        run_of(made, tmp_path / name, name, top_k=depth)
    fuse(FuseConfig(run=tuple(tmp_path / name for name in names), output=tmp_path / "fused", **settings))
    assert hybrid == read_run(tmp_path / "fused")
    assert max(map(len, hybrid.values())) > 3


def test_one_query_is_answered_with_texts(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["search", "why is the sky blue", "--index", str(made["flat"]), "--hybrid", str(made["sparse"])]
    line += [str(made["bm25"]), "--method", "relative", "--weights", "1", "1", "2", "--top-k", "3"]
    assert main([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["hybrid"] == [str(made["sparse"]), str(made["bm25"])]
    assert [answer["rank"] for answer in result["answers"]] == [1, 2, 3]
    for answer in result["answers"]:
        assert answer["text"] == " ".join(TEXTS[int(answer["id"][1:])].split())
    assert main(line) == 0
    shown, said = capsys.readouterr()
    assert shown.splitlines()[0].split()[:2] == ["1", f"{result['answers'][0]['score']:.4f}"]
    flags = f"--hybrid {made['sparse']} {made['bm25']} --method relative --weights 1.0 1.0 2.0 --queries FILE"
    assert flags in said.splitlines()[-1]


def test_words_alone_need_no_model(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = tmp_path / "again"
    build_index(IndexConfig(corpus=(made["corpus"],), output=second, type="bm25", k1=1.5))
    monkeypatch.setattr(Retriever, "for_job", lambda *_: pytest.fail("a model was opened"))
    answers = search(SearchConfig(index=made["bm25"], hybrid=(second,), query="blue sky")).answers
    assert {each.id for each in answers[:2]} == {"d0", "d1"}


def test_a_query_may_have_terms_of_its_own_where_asked(made: Made, tmp_path: Path) -> None:
    found = {each: run_of(made, tmp_path / each, "sparse", expansion=each) for each in ("auto", "no", "yes")}
    assert found["auto"] == found["no"] != found["yes"]
    assert len(found["yes"]["q0"]) > len(found["no"]["q0"])


def test_a_query_without_terms_has_no_sparse_hits(made: Made, tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_text("q0\tzzz qqq\nq1\tthe sky\n")
    queries = tmp_path / "queries.tsv"
    config = SearchConfig(index=made["sparse"], queries=queries, output=tmp_path / "run", top_k=100)
    result = search(config)
    assert result.queries == 2 and result.hits > 0
    fused = search(replace(config, hybrid=(made["bm25"],)))
    assert fused.hits >= result.hits


def test_negatives_are_mined_from_a_sparse_index(made: Made, tmp_path: Path) -> None:
    first, relevant, *others = run_of(made, tmp_path / "run", "sparse")["q0"]
    (tmp_path / "qrels.tsv").write_text(f"q0\t{relevant.document_id}\t1\n")
    where = {"index": made["sparse"], "queries": made["queries"], "qrels": tmp_path / "qrels.tsv"}
    config = MineConfig(**where, output=tmp_path / "mined.jsonl", from_rank=1, selection="top", negatives=2)
    mine(config)
    (row,) = map(json.loads, config.output.read_text().splitlines())
    assert [each["text"] for each in row["neg"]] == [TEXTS[int(hit.document_id[1:])] for hit in (first, others[0])]
    assert row["neg_scores"] == pytest.approx([first.score, others[0].score])
    assert row["pos_scores"] == pytest.approx([relevant.score])


def test_indexes_of_other_documents_are_refused(made: Made, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "other.jsonl", TEXTS[:-1])
    build_index(IndexConfig(corpus=(corpus,), output=tmp_path / "fewer", type="bm25"))
    write_corpus(tmp_path / "turned.jsonl", TEXTS[::-1])
    rows = (tmp_path / "turned.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(rows[::-1]))
    build_index(IndexConfig(corpus=(tmp_path / "turned.jsonl",), output=tmp_path / "turned", type="bm25"))
    for name, said in (("fewer", "9 documents against 10"), ("turned", "their ids, or the order of them, differ")):
        with pytest.raises(StorageError) as caught:
            search(SearchConfig(index=made["flat"], hybrid=(tmp_path / name,), query="sky"))
        assert f"{tmp_path / name}: holds other documents than {made['flat']} ({said}); build all" in str(caught.value)


@pytest.fixture(scope="module")
def other(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse index over the same corpus, by another model."""
    root = tmp_path_factory.mktemp("other")
    tiny.model(seed=1).save(root / "model")
    config = EncodeConfig(model=str(root / "model"), corpus=(made["corpus"],), output=root / "vectors", sparse=True)
    encode(config)
    build_index(IndexConfig(vectors=root / "vectors", output=root / "sparse", type="sparse"))
    return root


def test_indexes_of_two_models_are_refused_before_one_is_loaded(
    made: Made, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retriever, "for_job", lambda *_: pytest.fail("a model was opened"))
    with pytest.raises(ModelError) as caught:
        search(SearchConfig(index=made["flat"], hybrid=(other / "sparse",), query="sky"))
    said = str(caught.value)
    assert said.startswith(f"{other / 'sparse'}: was built with another model than {made['flat']}: ")
    assert "model_fingerprint was" in said and said.endswith("fuse the runs of two with llara fuse")


def test_another_model_than_the_index_was_built_with_is_refused(made: Made, other: Path) -> None:
    with pytest.raises(ModelError, match="is not the model that the index was built with"):
        search(SearchConfig(index=made["sparse"], query="sky", model=str(other / "model")))


def test_terms_that_were_chosen_otherwise_are_refused(made: Made, tmp_path: Path) -> None:
    config = EncodeConfig(model=str(made["model"]), corpus=(made["corpus"],), output=tmp_path / "v", sparse=True)
    encode(replace(config, expansion=True, sparse_top_k=20))
    build_index(IndexConfig(vectors=tmp_path / "v", output=tmp_path / "sparse", type="sparse"))
    with pytest.raises(
        StorageError, match=r"sparse: its terms were chosen otherwise than those of .*search one of the"
    ):
        search(SearchConfig(index=made["sparse"], hybrid=(tmp_path / "sparse",), query="sky"))
    index = open_index(tmp_path / "sparse")
    assert isinstance(index, SparseIndex) and index.manifest.settings["postings"] == 20 * len(TEXTS)


def test_a_model_without_a_head_gives_no_sparse_vectors(made: Made, tmp_path: Path) -> None:
    model = tiny.model()
    model.has_head = False
    model.save(tmp_path / "model")
    config = EncodeConfig(model=str(tmp_path / "model"), corpus=(made["corpus"],), output=tmp_path / "v", sparse=True)
    with pytest.raises(ModelError, match="its folder held no LM head"):
        encode(config)
    assert not (tmp_path / "v").exists()
    assert encode(replace(config, sparse=False)).documents == len(TEXTS)


def test_an_empty_query_is_named(made: Made) -> None:
    with pytest.raises(ConfigError, match="--query: is empty"):
        search(SearchConfig(index=made["flat"], hybrid=(made["sparse"],), query=" "))


HERE = Path("i")


@pytest.mark.parametrize(
    ("make", "problems"),
    [
        (lambda: SearchConfig(query="x", index=HERE, weights=(1.0,)), ["--weights: goes with --hybrid"]),
        (
            lambda: SearchConfig(query="x", index=HERE, hybrid=(Path("j"),), weights=(1.0,), depth=0, k=-1.0),
            [
                "--depth: must be 1 or more, got 0",
                "--k: must be 0 or more, got -1.0",
                "--weights: 1 for 2 indexes; give one for each",
            ],
        ),
        (
            lambda: SearchConfig(query="x", index=HERE, hybrid=(Path("j"), Path("./i")), weights=(0.0, 0.0, 0.0)),
            ["--weights: must be 0 or more, one of them above 0", "--hybrid: the same index is given twice"],
        ),
        (
            lambda: SearchConfig(query="x", index=HERE, method="relative", k=3.0, depth=2),
            ["--method: goes with --hybrid", "--k: goes with --hybrid", "--depth: goes with --hybrid"],
        ),
        (
            lambda: EncodeConfig(model="m", corpus=(HERE,), output=HERE, expansion=True, fold=True, sparse_top_k=0),
            [
                "--sparse-top-k: must be 1 or more, got 0",
                "--expansion: goes with --sparse",
                "--fold: goes with --sparse",
                "--sparse-top-k: goes with --sparse",
            ],
        ),
    ],
)
def test_settings_that_do_not_fit_together(make: Callable[[], Any], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert list(caught.value.problems) == problems
