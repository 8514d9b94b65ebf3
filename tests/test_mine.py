"""Mining of hard negatives: which candidates are taken, what is written, and what is refused."""

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llara import mine as mine_module
from llara.config import IndexConfig, MineConfig, ModelConfig, SearchConfig
from llara.data import read_documents, read_examples, read_rows, read_run, write_run
from llara.data.splits import normalise
from llara.encoding.shards import write_vectors
from llara.errors import ConfigError, DataError, StorageError
from llara.index.build import build_index
from llara.index.opening import open_index
from llara.mine import ceiling, mine
from llara.records import Document
from llara.search import search
from tests.reference import mining as reference

WORDS = ["river", "stone", "moss", "wind", "cloud", "rain", "hill", "bird", "tree", "leaf", "root", "seed"]
IDENTITY = {"model_fingerprint": "abc", "dtype": "float32", "dim": 16, "contract": {"bos": True}}
QUERIES, DOCUMENTS = 9, 80


def vector(text: str) -> Any:
    """Equal texts get equal vectors; all of them lie on one side, so that scores are above 0."""
    values = np.random.default_rng(zlib.crc32(normalise(text).encode())).random(16)
    return np.float32(values / np.linalg.norm(values))


class FakeRetriever:
    """Stands in for a model: texts become random vectors."""

    identity = IDENTITY

    @classmethod
    def for_job(cls, config: ModelConfig, usual: Any = None) -> "FakeRetriever":
        return cls()

    def encode_queries(self, texts: Sequence[str], **_: Any) -> Any:
        return np.stack([vector(text) for text in texts])


@pytest.fixture(autouse=True)
def _retriever(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("llara.retriever")
    module.Retriever = FakeRetriever  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llara.retriever", module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Queries, judgements and a corpus in which every third text stands again, written differently."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 8)) + f" {number}" for number in range(DOCUMENTS)]
    for number in range(3, DOCUMENTS, 3):
        texts[number] = texts[number - 3].upper().replace(" ", "\n", 1)
    corpus = [{"_id": f"d{n}", "title": f"T{n}" if n % 2 else "", "text": text} for n, text in enumerate(texts)]
    write_lines(tmp_path / "corpus.jsonl", corpus)
    queries = [{"_id": f"q{n}", "text": f"{WORDS[n]} and {WORDS[n + 1]}"} for n in range(QUERIES)]
    write_lines(tmp_path / "queries.jsonl", queries)
    judged = [f"q{n} 0 d{n * 7} 1\nq{n} 0 d{n * 7 + 1} 2\nq{n} 0 d{n * 7 + 2} 0\n" for n in range(QUERIES - 1)]
    (tmp_path / "qrels").write_text("".join(judged) + "unasked 0 nowhere 1\n")
    return tmp_path


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def index(folder: Path) -> Path:
    def encode(documents: list[Document]) -> Any:
        return np.stack([vector(each.text) for each in documents])

    rows = read_rows([folder / "corpus.jsonl"])
    write_vectors(folder / "vectors", rows, encode, IDENTITY, 16, "float32", 30, about={"model_path": "mini"})
    build_index(IndexConfig(vectors=folder / "vectors", output=folder / "index"))
    return folder / "index"


def settings(folder: Path, **changes: Any) -> MineConfig:
    given = {"queries": folder / "queries.jsonl", "qrels": folder / "qrels", "output": folder / "mined.jsonl"}
    return MineConfig(**{**given, "negatives": 4, "from_rank": 3, "to_rank": 40, **changes})


def run_of(folder: Path, index: Path) -> Path:
    search(SearchConfig(index=index, queries=folder / "queries.jsonl", output=folder / "run", top_k=60))
    return folder / "run"


RULES: list[dict[str, Any]] = [
    {},
    {"selection": "top"},
    {"seed": 7, "negatives": 50},
    {"margin": 0.02},
    {"relative_margin": 0.04},
    {"margin": 0.05, "relative_margin": 0.01, "selection": "top"},
    {"from_rank": 1, "to_rank": 5},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_negatives_are_those_of_the_rules(folder: Path, index: Path, rules: dict[str, Any]) -> None:
    config = settings(folder, index=index, **rules)
    mine(config)
    corpus = {each.id: each for each in read_documents([folder / "corpus.jsonl"])}
    opened = open_index(index)
    texts = {row["_id"]: row["text"] for row in lines(folder / "queries.jsonl")}
    found = lines(config.output)
    assert [line["query_id"] for line in found] == [f"q{n}" for n in range(QUERIES - 1)]
    for n, line in enumerate(found):
        top = opened.search(vector(texts[line["query_id"]])[None], DOCUMENTS)  # type: ignore[arg-type]
        ranked = [(opened.ids[at], score) for at, score in zip(top.positions[0], top.scores[0].tolist(), strict=True)]
        relevant = {f"d{n * 7}": dict(ranked)[f"d{n * 7}"], f"d{n * 7 + 1}": dict(ranked)[f"d{n * 7 + 1}"]}
        expected = reference.negatives(
            line["query_id"],
            ranked,
            relevant,
            corpus,
            count=config.negatives,
            from_rank=config.from_rank,
            to_rank=config.to_rank,
            seed=config.seed if config.selection == "random" else None,
            margin=config.margin,
            relative_margin=config.relative_margin,
        )
        scores = [np.float32(score) for score in line["neg_scores"]]
        assert list(zip([each["id"] for each in line["neg"]], scores, strict=True)) == expected
        assert dict(zip([each["id"] for each in line["pos"]], line["pos_scores"], strict=True)) == pytest.approx(
            relevant
        )
        assert line["query"] == texts[line["query_id"]]
        for passage in (*line["pos"], *line["neg"]):
            document = corpus[passage["id"]]
            assert (passage["text"], passage.get("title", "")) == (document.text, document.title)


def test_no_judged_positive_and_no_copy_of_one_is_a_negative(folder: Path, index: Path) -> None:
    mine(settings(folder, index=index, from_rank=1, to_rank=DOCUMENTS, negatives=DOCUMENTS))
    for line in lines(folder / "mined.jsonl"):
        texts = [normalise(each["text"]) for each in (*line["pos"], *line["neg"])]
        assert len(set(texts)) == len(texts)
        assert not {each["id"] for each in line["pos"]} & {each["id"] for each in line["neg"]}
    judged_away = {each["id"] for line in lines(folder / "mined.jsonl") for each in line["neg"]}
    assert "d2" in judged_away  # judged, but not relevant


def test_what_is_relevant_to_a_query_under_another_id_is_no_negative(folder: Path, index: Path) -> None:
    """Collections ask the same thing twice; what answers one answers the other."""
    whole = settings(folder, index=index, from_rank=1, to_rank=DOCUMENTS, negatives=DOCUMENTS)
    mine(whole)
    before = {line["query_id"]: {each["id"] for each in line["neg"]} for line in lines(whole.output)}
    rows = lines(folder / "queries.jsonl")
    rows[1]["text"] = f" {rows[0]['text'].upper()} "
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine(whole)
    first, second = lines(whole.output)[:2]
    relevant = [{each["id"] for each in line["pos"]} for line in (first, second)]
    assert relevant[0] & before["q1"] and relevant[1] & before["q0"], "they were negatives of the other query"
    for line in (first, second):
        assert not {each["id"] for each in line["neg"]} & (relevant[0] | relevant[1])


def test_the_file_depends_on_the_seed_and_not_on_the_blocks(
    folder: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mined(**changes: Any) -> bytes:
        mine(settings(folder, index=index, **changes))
        return (folder / "mined.jsonl").read_bytes()

    first = mined()
    assert mined() == first and mined(seed=1) != first
    monkeypatch.setattr(mine_module, "_BLOCK", 2)
    monkeypatch.setattr(mine_module, "_TEXTS", 1)
    assert mined() == first


def test_a_run_gives_what_its_index_gives(folder: Path, index: Path) -> None:
    mine(settings(folder, index=index, selection="top"))
    expected = lines(folder / "mined.jsonl")
    for corpus in ("corpus.jsonl", "vectors", "index"):
        config = settings(folder, run=run_of(folder, index), corpus=(folder / corpus,), selection="top")
        mine(config)
        for line, from_index in zip(lines(config.output), expected, strict=True):
            assert (line["pos"], line["neg"]) == (from_index["pos"], from_index["neg"])
            assert ("pos_scores" in line) == all(
                each["id"] in {hit.document_id for hit in read_run(folder / "run")[line["query_id"]]}
                for each in line["pos"]
            )
    assert not list(folder.glob(".tmp-*"))


def test_words_can_be_searched_too(folder: Path) -> None:
    build_index(IndexConfig(corpus=(folder / "corpus.jsonl",), output=folder / "words", type="bm25"))
    result = mine(settings(folder, index=folder / "words", from_rank=1))
    assert result.queries == QUERIES - 1 and result.negatives > QUERIES
    opened = open_index(folder / "words")
    for line in lines(folder / "mined.jsonl"):
        top = opened.search([line["query"]], DOCUMENTS)  # type: ignore[list-item, arg-type]
        pairs = zip(top.positions[0], top.scores[0].tolist(), strict=True)
        known = {opened.ids[at]: score for at, score in pairs if at >= 0}
        for side in ("pos", "neg"):
            for passage, score in zip(line[side], line[f"{side}_scores"], strict=True):
                assert np.float32(score) == np.float32(known.get(passage["id"], 0.0))


def test_a_relevant_document_that_a_run_lacks_scores_below_all(folder: Path, index: Path) -> None:
    hits = read_run(run_of(folder, index))
    write_run(
        folder / "run",
        {name: [hit for hit in each if hit.document_id not in ("d0", "d1")] for name, each in hits.items()},
    )
    config = settings(folder, run=folder / "run", corpus=(folder / "corpus.jsonl",), margin=0.0)
    result = mine(config)
    first = lines(config.output)[0]
    assert first["query_id"] == "q0" and first["neg"] == [] and "pos_scores" not in first
    assert result.without_negatives >= 1 and result.left_out["beyond_margin"] >= 37


def test_scores_of_a_reranker_filter_and_are_written(folder: Path, index: Path) -> None:
    run = read_run(run_of(folder, index))
    teacher = {
        name: {hit.document_id: -float(hit.rank % 11) for hit in hits if hit.rank % 5} for name, hits in run.items()
    }
    teacher["q0"] |= {"d0": -3.0}
    teacher["q0"].pop("d1", None)
    for document_id in ("d7", "d8"):
        teacher["q1"].pop(document_id, None)
    write_run(folder / "scores", {name: search_hits(name, scores) for name, scores in teacher.items()})
    config = settings(folder, run=folder / "run", corpus=(folder / "corpus.jsonl",), scores=folder / "scores", margin=2)
    result = mine(config)
    found = {line["query_id"]: line for line in lines(config.output)}
    assert "q1" not in found  # no relevant document of it has a score
    assert [each["id"] for each in found["q0"]["pos"]] == ["d0"] and found["q0"]["pos_scores"] == [-3.0]
    for name, line in found.items():
        scores = dict(zip([each["id"] for each in line["neg"]], line["neg_scores"], strict=True))
        assert scores == {each: teacher[name][each] for each in scores}
        assert all(score <= max(line["pos_scores"]) - 2 for score in scores.values())
    assert result.left_out["queries_without_scores"] >= 1 and result.left_out["without_scores"] > 0


def search_hits(query_id: str, scores: dict[str, float]) -> list[Any]:
    from llara.data import rank_hits

    return rank_hits(query_id, scores.items())


def test_finetune_reads_what_was_mined(folder: Path, index: Path) -> None:
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "bare", "title": "Nothing but a title", "text": " "}\n')
    hits = {
        name: [*hits[:20], *search_hits(name, {"bare": -1.0})] for name, hits in read_run(run_of(folder, index)).items()
    }
    write_run(folder / "run", hits)
    corpus = (folder / "corpus.jsonl",)
    mine(settings(folder, run=folder / "run", corpus=corpus, output=folder / "bare.jsonl", from_rank=21, to_rank=21))
    (only,) = {negative for each in read_examples([folder / "bare.jsonl"]) for negative in each.negatives}
    assert only == ("Nothing but a title", "")
    result = mine(settings(folder, index=index))
    examples = read_examples([folder / "mined.jsonl"])
    assert len(examples) == result.queries and sum(len(each.negatives) for each in examples) == result.negatives
    assert all(each.negatives for each in examples)


def test_a_collection_stands_for_queries_judgements_and_corpus(folder: Path, index: Path) -> None:
    (folder / "qrels").rename(folder / "train.qrels")
    (folder / "qrels").mkdir()
    judged = (folder / "train.qrels").read_text().replace(" 0 ", "\t").replace(" ", "\t").splitlines(keepends=True)
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged[:-1]))
    run = run_of(folder, index)
    config = MineConfig(run=run, queries=folder, split="train-all", output=folder / "out.jsonl", from_rank=3)
    assert mine(config).queries == QUERIES - 1
    with pytest.raises(DataError, match="no split 'trian'"):
        mine(MineConfig(run=run, queries=folder, split="trian", output=folder / "out2.jsonl"))


@pytest.mark.parametrize(
    ("relevant", "margin", "relative", "expected"),
    [
        ([0.8, 0.4], None, None, None),
        ([0.8, 0.4], 0.1, None, 0.7),
        ([0.8, None], None, 0.05, 0.76),
        ([0.8], 0.1, 0.05, 0.7),
        ([-2.0], None, 0.1, -2.2),  # a share of a negative score would lie above it
        ([None], 0.1, None, -np.inf),
    ],
)
def test_the_score_above_which_a_candidate_is_left_out(
    relevant: list[float | None], margin: float | None, relative: float | None, expected: float | None
) -> None:
    assert ceiling(relevant, margin, relative) == (expected if expected is None else pytest.approx(expected))


def test_mistakes_are_named_before_anything_is_written(folder: Path, index: Path) -> None:
    run, corpus = run_of(folder, index), (folder / "corpus.jsonl",)
    for changes, kind, said in (
        ({"index": index, "qrels": None}, ConfigError, "--qrels: is required"),
        ({"run": run}, ConfigError, "--corpus: is required"),
        ({"index": index, "output": folder / "qrels"}, ConfigError, "is also an input"),
        ({"index": index, "output": index / "mined"}, ConfigError, "lies in the folder"),
        (
            {"index": index, "from_rank": 79, "to_rank": 79, "margin": 2.0},
            DataError,
            r"no negative is left \(\d beyond",
        ),
        ({"index": folder / "vectors"}, StorageError, "is no index folder"),
    ):
        with pytest.raises(kind, match=said):
            mine(settings(folder, **changes))  # type: ignore[arg-type]
    (folder / "other").write_text("elsewhere 0 d1 1\n")
    with pytest.raises(DataError, match="other: no query has a relevant document"):
        mine(settings(folder, index=index, qrels=folder / "other"))
    (folder / "other").write_text("q1 0 d1 1\nq2 0 d99 1\n")
    for source in ({"index": index}, {"run": run, "corpus": corpus}):
        with pytest.raises(DataError, match="other:2: the corpus has no document with the id 'd99'"):
            mine(settings(folder, qrels=folder / "other", **source))
    write_run(folder / "strange", {"q1": search_hits("q1", {f"d{n}": -n for n in range(9)} | {"gone": -9.5})})
    with pytest.raises(DataError, match=r"strange:10: the corpus has no document with the id 'gone'"):
        mine(settings(folder, run=folder / "strange", corpus=corpus))
    write_run(folder / "strange", {"else": search_hits("else", {"d1": 1.0})})
    for changes in ({"run": folder / "strange"}, {"run": run, "scores": folder / "strange"}):
        with pytest.raises(DataError, match=r"strange: holds no query of .* that has a relevant document"):
            mine(settings(folder, corpus=corpus, **changes))
    with pytest.raises(ConfigError, match=r"--split: 'dev' would be the split of a collection, and .*qrels has none"):
        mine(settings(folder, run=run, corpus=corpus, split="dev"))
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d1", "text": "again"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:81: duplicate id"):
        mine(settings(folder, run=run, corpus=corpus))
    assert not (folder / "mined.jsonl").exists() and not list(folder.glob(".tmp-*"))


def test_settings_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        MineConfig(queries=tmp_path, output=tmp_path, from_rank=9, to_rank=3, relative_margin=1.5, negatives=0)
    for said in ("--index or --run", "--to-rank: 3 comes before --from-rank 9", "--relative-margin", "--negatives"):
        assert said in str(caught.value)


def test_a_reranker_teaches_a_retriever(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a run over a reranker's scores to distillation: what each command writes, the next one reads."""
    monkeypatch.delitem(sys.modules, "llara.retriever")
    from llara.config import FinetuneConfig, RerankConfig
    from llara.rerank import rerank
    from llara.training.finetune import finetune
    from tests import tiny
    from tests.tiny_reranker import reranker

    reranker().save(tmp_path / "teacher")
    build_index(IndexConfig(corpus=(folder / "corpus.jsonl",), output=folder / "words", type="bm25"))
    queries, corpus, device = folder / "queries.jsonl", (folder / "corpus.jsonl",), {"device": "cpu", "offline": True}
    search(SearchConfig(index=folder / "words", queries=queries, output=folder / "run", top_k=60))
    scored = {"run": folder / "run", "queries": queries, "corpus": corpus, "output": folder / "scores"}
    rerank(
        RerankConfig(
            model=str(tmp_path / "teacher"), **scored, depth=12, top_k=14, add_relevant=folder / "qrels", **device
        )
    )
    config = settings(folder, run=folder / "run", corpus=corpus, scores=folder / "scores", from_rank=1, to_rank=12)
    result = mine(config)
    assert result.queries == QUERIES - 1 and not result.left_out.get("queries_without_scores")
    teacher = read_run(folder / "scores")
    for line in lines(config.output):
        known = {hit.document_id: hit.score for hit in teacher[line["query_id"]]}
        for side in ("pos", "neg"):
            scores = [np.float32(score) for score in line[f"{side}_scores"]]
            assert scores == [np.float32(known[each["id"]]) for each in line[side]] and scores
    base = tiny.save_base(tmp_path / "base")
    student = {"model": str(base), "train": (config.output,), "output": tmp_path / "student", "query_length": 24}
    student |= {"passage_length": 32, "steps": 2, "batch_size": 3, "negatives": 3, "distill": "kl", **device}
    assert finetune(FinetuneConfig(**student)).steps == 2  # type: ignore[arg-type]
