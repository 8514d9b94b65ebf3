import json
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llara.config import EncodeConfig, EvaluateConfig, IndexConfig, ModelConfig, SearchConfig
from llara.data import read_rows, read_run
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import record_model
from llara.encoding.shards import write_documents, write_vectors
from llara.errors import ConfigError, DataError, ModelError, StorageError
from llara.evaluate import evaluate
from llara.index.bm25 import Bm25Index
from llara.index.build import build_index
from llara.records import Document, Hit
from llara.search import Found, search, snippet

IDENTITY = {"model_fingerprint": "abc", "dtype": "float32", "dim": 4, "contract": {"bos": True}}
TEXTS = {
    "d0": ("Foxes", "The quick fox jumps over the lazy dog."),
    "d1": ("", "A dog sleeps."),
    "d2": ("Silver", "Silver is a metal."),
}


def embed(text: str) -> list[float]:
    words = text.lower()
    values = np.array([words.count("fox"), words.count("dog"), words.count("silver"), 0.1])
    return [float(each) for each in values / np.linalg.norm(values)]


class FakeRetriever:
    """Stands in for a model: counts three words."""

    loaded: list[str]
    identity: dict[str, Any]

    @classmethod
    def for_job(cls, config: ModelConfig, usual: Any = None) -> "FakeRetriever":
        if config.model.endswith("models/broken"):
            raise ModelError(f"{config.model}: has no tokenizer")
        cls.loaded.append(config.model)
        return cls()

    def encode_queries(self, texts: Sequence[str], token_budget: int, on_batch: Callable[[int], None]) -> Any:
        on_batch(len(texts))
        return np.array([embed(text) for text in texts], np.float32)


@pytest.fixture(autouse=True)
def retriever(monkeypatch: pytest.MonkeyPatch) -> type[FakeRetriever]:
    module = ModuleType("llara.retriever")
    FakeRetriever.loaded, FakeRetriever.identity = [], {**IDENTITY}
    module.Retriever = FakeRetriever  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llara.retriever", module)
    return FakeRetriever


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"_id": name, "title": title, "text": text} for name, (title, text) in TEXTS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def flat(tmp_path: Path, corpus: Path) -> Path:
    return make_flat(tmp_path, corpus, ours(tmp_path))


def ours(tmp_path: Path) -> str:
    """The absolute path of the model that the index names."""
    (tmp_path / "models" / "ours").mkdir(parents=True, exist_ok=True)
    return str(tmp_path / "models" / "ours")


def make_flat(tmp_path: Path, corpus: Path, model: str) -> Path:
    def encode(documents: list[Document]) -> Any:
        return np.array([embed(each.text) for each in documents], np.float32)

    about = {"model_path": record_model(model, tmp_path / "vectors")}
    write_vectors(tmp_path / "vectors", read_rows([corpus]), encode, IDENTITY, 4, "float32", 10, about=about)
    build_index(IndexConfig(vectors=tmp_path / "vectors", output=tmp_path / "flat"))
    return tmp_path / "flat"


@pytest.fixture
def words(tmp_path: Path, corpus: Path) -> Path:
    build_index(IndexConfig(corpus=(corpus,), output=tmp_path / "words", type="bm25"))
    return tmp_path / "words"


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.tsv"
    path.write_text("q1\tfox and dog\nq2\tsilver\nq3\tunheard\n")
    return path


def test_one_query_on_a_flat_index(flat: Path, retriever: type[FakeRetriever], tmp_path: Path) -> None:
    result = search(SearchConfig(index=flat, query="silver"))
    assert retriever.loaded == [ours(tmp_path)]  # the model that the index names
    assert (result.queries, result.hits, result.without_hits, result.output) == (1, 3, 0, None)
    first = result.answers[0]
    assert first == Found(1, first.score, "d2", "Silver", "Silver is a metal.")
    assert [each.rank for each in result.answers] == [1, 2, 3]
    assert first.score == float(np.float32(np.dot(np.float32(embed("silver")), np.float32(embed("silver")))))


def test_one_query_on_words_needs_no_model(words: Path, retriever: type[FakeRetriever]) -> None:
    result = search(SearchConfig(index=words, query="sleeping dogs", top_k=2))
    assert [(each.id, each.title) for each in result.answers] == [("d1", ""), ("d0", "Foxes")]
    assert retriever.loaded == []
    nothing = search(SearchConfig(index=words, query="unheard"))
    assert (nothing.hits, nothing.without_hits, nothing.answers) == (0, 1, ())


def test_a_run(flat: Path, queries: Path, tmp_path: Path, retriever: type[FakeRetriever]) -> None:
    output = tmp_path / "runs" / "ours.run"
    config = SearchConfig(index=flat, queries=queries, output=output, model="models/copy", top_k=2)
    result = search(config)
    assert retriever.loaded == ["models/copy"]
    assert (result.queries, result.hits, result.without_hits) == (3, 6, 0)
    run = read_run(output)
    assert [[hit.document_id for hit in run[query]] for query in ("q1", "q2")] == [["d0", "d1"], ["d2", "d1"]]
    assert len(run["q3"]) == 2
    lines = [line.split() for line in output.read_text().splitlines()]
    assert all(str(np.float32(line[4])) == line[4] for line in lines)  # float32 in full
    assert tomllib.loads((tmp_path / "runs" / "ours.run.toml").read_text())["top_k"] == 2


def test_a_run_on_words_leaves_out_queries_without_hits(words: Path, queries: Path, tmp_path: Path) -> None:
    output = tmp_path / "words.run"
    result = search(SearchConfig(index=words, queries=queries, output=output))
    assert (result.queries, result.hits, result.without_hits) == (3, 3, 1)
    assert {query: [hit.document_id for hit in hits] for query, hits in read_run(output).items()} == {
        "q1": ["d0", "d1"],
        "q2": ["d2"],
    }
    first = output.read_bytes()
    search(SearchConfig(index=words, queries=queries, output=output))
    assert output.read_bytes() == first


def test_ties_in_a_run_are_in_the_order_of_trec_eval(tmp_path: Path) -> None:
    corpus = tmp_path / "same.jsonl"
    corpus.write_text("".join(json.dumps({"_id": name, "text": "the same text"}) + "\n" for name in "bdace"))
    build_index(IndexConfig(corpus=(corpus,), output=tmp_path / "index", type="bm25"))
    result = search(SearchConfig(index=tmp_path / "index", query="same", top_k=3))
    assert [each.id for each in result.answers] == ["e", "d", "c"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_fingerprint": "f" * 64}, "model_fingerprint was 'abc', is ffffffffffff..."),
        ({"contract": {"bos": False}}, "contract.bos was True, is False"),
        ({"dim": 8}, "dim was 4, is 8"),
    ],
)
def test_another_model_is_refused(
    flat: Path, retriever: type[FakeRetriever], tmp_path: Path, change: Any, named: str
) -> None:
    retriever.identity |= change
    with pytest.raises(ModelError) as caught:
        search(SearchConfig(index=flat, query="fox", model="models/other"))
    said = f"models/other: is not the model that the index was built with, {ours(tmp_path)} ({named})"
    assert said in str(caught.value)


def test_another_type_of_weights_is_allowed(flat: Path, retriever: type[FakeRetriever]) -> None:
    retriever.identity["dtype"] = "bfloat16"
    assert search(SearchConfig(index=flat, query="fox")).hits == 3


def test_the_model_is_found_from_any_folder(
    tmp_path: Path, corpus: Path, retriever: type[FakeRetriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "models" / "ours").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    make_flat(Path(), corpus, "models/ours")
    monkeypatch.chdir(tmp_path)
    assert search(SearchConfig(index=Path("a/flat"), query="fox")).hits == 3
    (tmp_path / "a").rename(tmp_path / "b")  # all of it may move together
    assert search(SearchConfig(index=tmp_path / "b" / "flat", query="fox")).hits == 3
    assert retriever.loaded == [str(tmp_path / each / "models" / "ours") for each in "ab"]


def test_a_model_that_has_moved(tmp_path: Path, flat: Path, retriever: type[FakeRetriever]) -> None:
    named = ours(tmp_path)
    moved = Path(named).rename(tmp_path / "moved")
    with pytest.raises(ConfigError) as caught:
        search(SearchConfig(index=flat, query="fox"))
    assert f"--model: is required, {flat} was built with {named}, which is no folder on this" in str(caught.value)
    assert retriever.loaded == []
    assert search(SearchConfig(index=flat, query="fox", model=str(moved))).hits == 3


def test_a_model_that_does_not_open(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "models" / "broken").mkdir(parents=True)
    index = make_flat(tmp_path, corpus, str(tmp_path / "models" / "broken"))
    with pytest.raises(ModelError, match=r"has no tokenizer; this is the model that the index names.*give --model"):
        search(SearchConfig(index=index, query="fox"))


def test_a_hub_id_in_an_index_is_never_followed(
    tmp_path: Path, corpus: Path, retriever: type[FakeRetriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make_flat(tmp_path, corpus, "stranger/model")
    (tmp_path / "stranger" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # nor does a folder that happens to have its name count
    with pytest.raises(ConfigError, match=r"--model: is required, .*flat was built with stranger/model, which is no"):
        search(SearchConfig(index=index, query="fox"))
    assert retriever.loaded == []
    assert search(SearchConfig(index=index, query="fox", model="stranger/model")).hits == 3


def test_texts_that_are_gone_cost_no_hits(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vectors").rename(tmp_path / "elsewhere")
    result = search(SearchConfig(index=flat, query="silver"))
    assert (result.answers[0].id, result.answers[0].text) == ("d2", "")
    assert "texts cannot be shown" in capsys.readouterr().err


def test_texts_are_read_where_the_hits_stand(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("searched by id")

    monkeypatch.setattr(DocumentStore, "find", refuse)
    assert search(SearchConfig(index=words, query="silver")).answers[0].title == "Silver"


def test_texts_are_found_in_a_store_of_another_order(flat: Path, corpus: Path, tmp_path: Path) -> None:
    rows = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([rows[2], rows[0]]))
    shutil.rmtree(tmp_path / "vectors")
    write_documents(tmp_path / "vectors", read_rows([corpus]))
    answers = search(SearchConfig(index=flat, query="silver dog")).answers
    assert {each.id: (each.title, each.text) for each in answers} == {**TEXTS, "d1": ("", "")}


def test_the_hits_of_a_run_are_not_held(
    words: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llara.ranking.BLOCK", 1)
    asked: list[str] = []
    plain = Bm25Index.search

    def watched(self: Bm25Index, block: Sequence[str], top_k: int, allowed: Any) -> Any:
        asked.extend(block)
        return plain(self, block, top_k, allowed)

    def write(path: Path, pairs: Iterable[tuple[str, Sequence[Hit]]]) -> None:
        for number, (query_id, _) in enumerate(pairs, 1):
            assert (query_id, len(asked)) == (f"q{number}", number), "searched ahead of what was written"

    monkeypatch.setattr(Bm25Index, "search", watched)
    monkeypatch.setattr("llara.search.write_run", write)
    result = search(SearchConfig(index=words, queries=queries, output=tmp_path / "run"))
    assert (result.queries, result.hits, result.without_hits) == (3, 3, 1)


def test_a_query_may_be_kept_as_a_run(words: Path, tmp_path: Path) -> None:
    result = search(SearchConfig(index=words, query="silver", output=tmp_path / "run"))
    assert (result.hits, [each.id for each in result.answers]) == (1, ["d2"])
    assert [hit.document_id for hit in read_run(tmp_path / "run")["query"]] == ["d2"]


def test_mistakes_are_named(tmp_path: Path, flat: Path, words: Path) -> None:
    with pytest.raises(ConfigError, match="--query: is empty"):
        search(SearchConfig(index=words, query="  "))
    with pytest.raises(StorageError, match="nowhere: no such folder; build one with: llara index"):
        search(SearchConfig(index=tmp_path / "nowhere", query="fox"))
    with pytest.raises(StorageError, match="is no index folder, it holds vectors"):
        search(SearchConfig(index=tmp_path / "vectors", query="fox"))
    with pytest.raises(DataError, match=r"missing\.tsv"):
        search(SearchConfig(index=words, queries=tmp_path / "missing.tsv", output=tmp_path / "run"))
    (flat / "index.faiss").write_bytes(b"short")
    with pytest.raises(StorageError, match=r"index\.faiss: is damaged"):
        search(SearchConfig(index=flat, query="fox"))


def test_an_output_that_is_also_an_input_is_refused(words: Path, queries: Path, tmp_path: Path) -> None:
    before, settings = queries.read_bytes(), queries.rename(tmp_path / "run.toml")
    for output, said in (
        (settings, "is also an input"),
        (tmp_path / "run", "is also an input"),  # its run.toml would be
        (words / "manifest.json", "lies in the folder"),
    ):
        with pytest.raises(ConfigError, match=f"--output: .* {said}"):
            search(SearchConfig(index=words, queries=settings, output=output))
    assert settings.read_bytes() == before
    with pytest.raises(StorageError, match="null: is a device"):
        search(SearchConfig(index=tmp_path / "not opened", queries=settings, output=Path("/dev/null")))


def test_snippet_shows_the_part_that_speaks_of_the_query() -> None:
    filler = "Nothing to see here at all. " * 20
    text = f"{filler}Reading a file\nline by   line is done with open. {filler}"
    shown = snippet(text, "how to read a file line by line")
    assert shown.startswith("… Reading a file line by line is done with open.")
    assert shown.endswith(" …")
    assert len(shown) <= 204
    assert snippet(text, "unheard").startswith("Nothing to see")
    assert snippet("  short\n text ", "anything") == "short text"
    assert snippet("x" * 1000, "word") == "x" * 200 + " …"
    assert snippet("", "word") == ""
    assert snippet(filler + "needle", "needle").endswith("needle")


def test_from_text_to_table_with_a_real_model(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llara.retriever")
    from llara.encoding.encode import encode

    encode(EncodeConfig(model="mini", corpus=(corpus,), output=tmp_path / "v", device="cpu"))
    build_index(IndexConfig(vectors=tmp_path / "v", output=tmp_path / "i"))
    queries, qrels, run = tmp_path / "q.tsv", tmp_path / "qrels.tsv", tmp_path / "mini.run"
    queries.write_text("q1\tA dog sleeps.\n")
    qrels.write_text("q1\td1\t1\n")
    result = search(SearchConfig(index=tmp_path / "i", queries=queries, output=run, device="cpu"))
    assert (result.hits, len(read_run(run)["q1"])) == (3, 3)
    found = evaluate(EvaluateConfig(run=(run,), qrels=qrels, metrics=("R@100",)))
    assert found.means["mini"]["R@100"] == 1.0
