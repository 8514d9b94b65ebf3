"""The job from configuration to result, and as a command: terms, shared terms, the comparison, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llara.cli import main
from llara.cli.parse import parse
from llara.config import ExplainConfig
from llara.contract import Contract, read_record
from llara.errors import ConfigError, DataError, MissingExtra, ModelError
from llara.explain import job
from llara.explain.job import explain, term_text
from llara.lexical import TermOptions, TermReader
from llara.model import EmbeddingModel
from llara.progress import set_quiet
from llara.templates import PAPER, REPLLAMA
from tests import tiny, tiny_reranker
from tests.training.helpers import write_text

QUERY, DOCUMENT = "why is the sky blue", tiny.TEXT[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "saved"
    tiny.model("llama", contract=Contract(template=PAPER, bos=True)).save(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base", seed=1)


@pytest.fixture
def made(saved: Path, tmp_path: Path) -> Callable[..., ExplainConfig]:
    sample = write_text(tmp_path / "sample.jsonl", documents=12)

    def make(**changes: Any) -> ExplainConfig:
        values: dict[str, Any] = {"model": str(saved), "query": (QUERY,), "document": (DOCUMENT,), "sample": (sample,)}
        return ExplainConfig(**{**values, "device": "cpu", "offline": True, **changes})

    return make


@pytest.fixture(autouse=True)
def _loud() -> Any:
    set_quiet(False)
    yield
    set_quiet(False)


def test_terms_are_those_of_the_reader_and_tell_text_from_expansion(made: Callable[..., ExplainConfig]) -> None:
    (view,) = explain(made(top_k=300)).views
    model = tiny.model("llama", contract=Contract(template=PAPER, bos=True))
    reader = TermReader(model, TermOptions(top_k=300, fold=True))
    for found, side in ((view.queries[0], "query"), (view.documents[0], "passage")):
        ids, weights = reader.encode([found.text], side)[1].of(0)
        assert [each.term for each in found.terms] == [term_text(reader, token) for token in ids.tolist()]
        assert [each.weight for each in found.terms] == pytest.approx(weights.tolist(), abs=1e-4)
        template = model.bind()
        bare = {model.tokenizer.decode([t]).strip().lower() for t in template.text_ids([found.text], side)[0]}
        assert {each.term for each in found.terms if each.in_text} == {each.term for each in found.terms} & bare
        assert found.own == len(bare) and 0 < found.own_said < len(found.terms) <= 300
        assert found.own_said == sum(each.in_text for each in found.terms)


def test_shared_terms_add_up_to_the_lexical_score(made: Callable[..., ExplainConfig]) -> None:
    (view,) = explain(made(query=(QUERY, "read a file"), document=(DOCUMENT, "close the file"))).views
    assert [(pair.query, pair.document) for pair in view.pairs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for pair in view.pairs:
        asked = {each.term: each.weight for each in view.queries[pair.query].terms}
        told = {each.term: each.weight for each in view.documents[pair.document].terms}
        assert {each.term for each in pair.shared} == asked.keys() & told.keys()
        assert pair.lexical == pytest.approx(sum(asked[term] * told[term] for term in asked.keys() & told.keys()))
        assert sum(each.share for each in pair.shared) == pytest.approx(1.0)
        assert [each.contribution for each in pair.shared] == sorted(each.contribution for each in pair.shared)[::-1]
    model = tiny.model("llama", contract=Contract(template=PAPER, bos=True))
    expected = model.encode(["read a file"], "query") @ model.encode([DOCUMENT], "passage").T
    assert view.pairs[2].score == pytest.approx(float(expected), abs=1e-5)


def test_variants_are_one_entry_unless_told_otherwise(made: Callable[..., ExplainConfig]) -> None:
    folded = explain(made(top_k=400)).views[0].queries[0].terms
    apart = explain(made(top_k=400, fold=False)).views[0].queries[0].terms
    assert len({each.term for each in folded}) == len(folded) < len(apart)
    heaviest: dict[str, float] = {}
    for each in apart:
        # A part of a character goes by a name that is no ASCII, and stands for itself.
        name = (each.term.strip().lower() or each.term) if each.term.isascii() else each.term
        heaviest[name] = max(heaviest.get(name, 0.0), each.weight)
    assert {each.term: each.weight for each in folded} == pytest.approx(heaviest)


def test_two_models_stand_side_by_side(made: Callable[..., ExplainConfig], saved: Path, base: Path) -> None:
    found = explain(made(compare=str(base)))
    assert [view.model for view in found.views] == [str(base), str(saved)]
    before, after = found.views
    assert after == explain(made()).views[0]
    assert before.queries[0].terms != after.queries[0].terms
    text = found.to_text()
    assert text.index(f"term: {base}") < text.index(f"term: {saved}")


def test_a_compared_base_model_is_used_with_the_contract_of_the_model(base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "repllama"
    model = tiny.model("llama", contract=Contract(template=REPLLAMA, bos=True, query_length=32), seed=1)
    model.save(folder)
    assert read_record(base) is None
    sample = write_text(tmp_path / "sample.jsonl")
    values: dict[str, Any] = {"query": (QUERY,), "sample": (sample,), "device": "cpu"}
    before, after = explain(ExplainConfig(model=str(folder), compare=str(base), **values)).views
    assert before.queries == after.queries  # the same weights, and so the same template
    assert f"used with the contract of {folder}" in capsys.readouterr().err


def test_a_removed_component_changes_terms_and_not_scores(made: Callable[..., ExplainConfig]) -> None:
    plain, removed = explain(made()).views[0], explain(made(remove_component=True)).views[0]
    assert plain.pairs[0].score == removed.pairs[0].score
    assert plain.queries[0].terms != removed.queries[0].terms
    assert plain.documents[0].terms != removed.documents[0].terms
    assert plain.removed == {} and set(removed.removed) == {"query", "passage"}
    assert all(0 < share < 1 for share in removed.removed.values())


def test_a_random_model_is_near_chance_and_says_so_once(made: Callable[..., ExplainConfig], capsys: Any) -> None:
    found = explain(made())
    assert found.views[0].alignment.near_chance
    assert len(found.warnings) == 1 and "hardly better than other ones" in found.warnings[0]
    assert capsys.readouterr().err.count(found.warnings[0]) == 1
    assert found.next_command.endswith("--corpus PATH --output DIR") and " adapt " in found.next_command


def test_embeddings_that_say_nothing_are_warned_of(
    made: Callable[..., ExplainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = EmbeddingModel.head
    monkeypatch.setattr(EmbeddingModel, "head", lambda self, states: head(self, states) - 1e4)
    found = explain(made())
    assert any("2 of 2 embeddings say nothing" in warning for warning in found.warnings)
    assert found.views[0].pairs[0].shared == () and found.views[0].pairs[0].lexical == 0
    assert "0 shared terms" in found.to_text()


def test_texts_of_one_kind_have_no_pairs(made: Callable[..., ExplainConfig]) -> None:
    assert explain(made(document=())).views[0].pairs == ()
    (view,) = explain(made(query=(), document=("a", "b"), remove_component=True)).views
    assert (len(view.documents), view.queries, view.pairs) == (2, (), ())
    assert set(view.removed) == {"passage"}


def test_the_default_sample_is_on_every_machine(made: Callable[..., ExplainConfig]) -> None:
    found = explain(made(sample=(), sample_size=16, remove_component=True))
    assert found.views[0].alignment.source == "Python's documentation strings"
    assert 14 <= found.views[0].alignment.texts <= 16
    assert any("give --sample with texts like your own" in warning for warning in found.warnings)


def test_a_sample_is_the_beginning_of_the_corpus(made: Callable[..., ExplainConfig]) -> None:
    assert explain(made(sample_size=5)).views[0].alignment.texts == 5


# Refusals ----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_head_is_refused(tmp_path: Path, made: Callable[..., ExplainConfig]) -> None:
    model = tiny.model("llama", contract=Contract(bos=True))
    model.has_head = False
    model.save(tmp_path / "headless")
    with pytest.raises(ModelError, match="held no LM head, so nothing says which tokens"):
        explain(made(model=str(tmp_path / "headless")))


def test_a_reranker_is_refused(tmp_path: Path, made: Callable[..., ExplainConfig]) -> None:
    folder = tiny_reranker.save_published(tmp_path / "reranker")
    with pytest.raises(ModelError, match="is a reranker"):
        explain(made(model=str(folder)))


def test_all_faults_of_a_configuration_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ExplainConfig(query=(" ",), show=0, sample_size=1, plot=Path("p.gif"))
    assert caught.value.problems == (
        "--model: is required (a folder, a hub id, or mini)",
        "--query: is empty",
        "--show: must be 1 or more, got 0",
        "--sample-size: must be 2 or more, got 1",
        "--plot: p.gif is none of .png, .svg, .pdf",
    )
    with pytest.raises(ConfigError, match="--query or --document: give at least one text"):
        ExplainConfig(model="mini")
    with pytest.raises(ConfigError, match="--plot: 18 rows of panels, at most 12 fit"):
        ExplainConfig(model="m", compare="n", query=("a",) * 3, document=("b",) * 3, plot=Path("p.png"))


def test_a_missing_extra_is_named_before_anything_is_opened(
    made: Callable[..., ExplainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"--plot needs an optional dependency.*pip install 'llara\[report\]'"):
        explain(made(model=str(tmp_path / "gone"), plot=tmp_path / "p.png"))


def test_a_plot_over_an_input_is_refused(made: Callable[..., ExplainConfig], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: name)
    sample = write_text(tmp_path / "sample.png")
    with pytest.raises(ConfigError, match=r"--plot: .*sample\.png is also an input"):
        explain(made(sample=(sample,), plot=sample))


def test_a_plot_lies_beside_its_settings(made: Callable[..., ExplainConfig], base: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    config = made(compare=str(base), plot=tmp_path / "out" / "said.svg")
    assert explain(config).plot == config.plot
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"said.svg", "said.svg.toml"}
    again = parse(["explain", "--config", str(tmp_path / "out" / "said.svg.toml")])
    assert again is not None and again.config == config


def test_a_bad_sample_is_named(made: Callable[..., ExplainConfig], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"_id": "a", "text": "fine"}\n{"_id": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        explain(made(sample=(path,)))
    path.write_text('{"_id": "a", "text": "fine"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="1 document, and a sample takes two or more"):
        explain(made(sample=(path,)))


# The command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def line(saved: Path, tmp_path: Path) -> list[str]:
    sample = write_text(tmp_path / "sample.jsonl", documents=12)
    texts = ["--query", QUERY, "--query", "read a file", "--document", DOCUMENT]
    return ["explain", "--model", str(saved), "--sample", str(sample), "--device", "cpu", *texts]


def test_the_command_prints_tables(line: list[str], capsys: Any) -> None:
    assert main([*line, "--show", "4"]) == 0
    out, err = capsys.readouterr()
    assert "alignment 0." in out.splitlines()[0] and "\x1b" not in out
    assert f"query (NEXT side): {QUERY}" in out and "query 2 and document 1: score" in out
    table = out[out.index("document (SELF side)") :].splitlines()
    assert table[2].split() == ["term", "weight", "from"]
    assert all(row.split()[-1] in ("text", "expansion") for row in table[3:7]) and table[7] == ""
    assert "next: " in err and "warning: " in err


def test_the_command_prints_json(line: list[str], capsys: Any) -> None:
    assert main([*line, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    (view,) = found["views"]
    assert err == "" and [each["text"] for each in view["queries"]] == [QUERY, "read a file"]
    assert set(view["documents"][0]["terms"][0]) == {"term", "weight", "in_text"}
    assert set(view["pairs"][0]["shared"][0]) == {"term", "query_weight", "document_weight", "contribution", "share"}
    assert set(view["alignment"]) == {"recall", "chance", "error", "texts", "source", "gain", "near_chance"}
    assert view["alignment"]["near_chance"] is True and len(found["warnings"]) == 1


def test_mistakes_are_one_line(line: list[str], capsys: Any) -> None:
    assert main([*line, "--compare", "/gone"]) == 2
    assert "error: /gone: no such folder" in capsys.readouterr().err
    assert main(["explain", "--model", "mini"]) == 2
    assert capsys.readouterr().err == "error: --query or --document: give at least one text\n"


def test_the_models_own_mode_and_gradients_are_left_alone(made: Callable[..., ExplainConfig]) -> None:
    explain(made())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
