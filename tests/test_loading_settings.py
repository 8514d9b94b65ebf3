"""What the user asks for against what the model folder says."""

from pathlib import Path

import pytest

from llara.agreement import adds_bos
from llara.config import ModelConfig
from llara.contract import Contract
from llara.errors import ConfigError, ModelError
from llara.loading import load_model, write_contract
from llara.templates import PAPER, RELEASE, REPLLAMA
from tests import tiny
from tests.folders import TEXTS, flip, load, save_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "saved")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model folder, without `llara.json`."""
    return tiny.save_base(tmp_path / "base")


def test_base_folder_takes_its_contract_from_the_settings(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(base)
    assert (model.contract.template, model.contract.bos) == (PAPER, True)
    captured = capsys.readouterr()
    assert captured.err == f"{base}: no llara.json in the folder; using template paper, BOS yes\n"
    assert captured.out == ""
    model = load(base, template="repllama", bos="no")
    assert (model.contract.template, model.contract.bos) == (REPLLAMA, False)
    assert "using template repllama, BOS no" in capsys.readouterr().err
    assert load(base).fingerprint != model.fingerprint


def test_saved_folder_says_nothing(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(saved)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_flags_that_agree_with_the_contract(saved: Path) -> None:
    assert load(saved, template="paper", bos="yes").contract.query_length == 40


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"template": "release"},
            r"^--template: .*saved was saved with template 'paper' and BOS yes; leave the flag out",
        ),
        ({"bos": "no"}, r"^--bos: .*saved was saved with template 'paper' and BOS yes; leave the flag out"),
    ],
)
def test_flags_that_contradict_the_contract(saved: Path, flags: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(saved, **flags)
    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig(model=str(saved), **flags), for_training=True)  # type: ignore[arg-type]


def test_adaptation_may_give_a_saved_model_another_template(saved: Path) -> None:
    config = ModelConfig(model=str(saved), template="release", bos="no")
    model = load_model(config, for_training=True, new_template=True)
    assert (model.contract.template, model.contract.bos) == (RELEASE, False)
    assert model.contract.query_length == model.bind().query.overhead + 32  # 40 would leave no room


def test_the_probe_is_checked_before_another_template_is_taken(saved: Path) -> None:
    flip(saved / "model.safetensors", "model.norm.weight", 26)
    with pytest.raises(ModelError, match=r"the weights do not give the vectors they gave when saved"):
        load_model(ModelConfig(model=str(saved), template="release"), for_training=True, new_template=True)


def test_missing_slot_tokens_are_refused_outside_training(base: Path) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer lacks <s1>, .*slot tokens of template 'release'"):
        load(base, template="release")


def test_bos_without_a_bos_token(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", words=tiny.tokenizer(bos=False))
    assert not load(folder).contract.bos
    with pytest.raises(ModelError, match=r"has no BOS token; use --bos no"):
        load(folder, bos="yes")


def test_adds_bos() -> None:
    assert adds_bos(tiny.tokenizer())
    assert not adds_bos(tiny.tokenizer(adds_bos=False))
    assert not adds_bos(tiny.tokenizer(bos=False))


def test_models_without_sdpa_load(tmp_path: Path) -> None:
    model = load(tiny.save_base(tmp_path / "bloom", "bloom"))
    assert model.encode(TEXTS, "query").shape == (3, tiny.HIDDEN)


def test_write_contract_gives_a_base_folder_one(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contract = Contract(template=REPLLAMA, bos=True, passage_length=70)
    write_contract(base, contract)
    capsys.readouterr()
    assert load(base, verify=True).contract == contract
    assert capsys.readouterr().err == ""
