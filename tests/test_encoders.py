"""Encoders: the same vectors as transformers gives one text at a time, and what of them is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BartConfig, BartModel, FNetConfig, FNetModel

from llara.config import ModelConfig
from llara.contract import Contract, digest
from llara.errors import ConfigError, ModelError
from llara.files import write_json_atomic
from llara.loading import load_model, write_contract
from llara.retriever import Retriever
from llara.templates import BGE, CLS, E5, ENCODERS, MEAN, RETROMAE, BoundTemplate, SideName, Template, load_template
from tests import tiny, tiny_encoder
from tests.folders import load
from tests.reference import encoders as slow

TEXTS = [*tiny.TEXT, "a", "sky blue", tiny.TEXT[0] * 9]
SIDES: tuple[SideName, ...] = ("query", "passage")
READABLE = [
    (family, name) for family in tiny_encoder.FAMILIES for name in ("e5", "cls") if (family, name) != ("t5", "cls")
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One published encoder per family, without a contract."""
    root = tmp_path_factory.mktemp("encoders")
    return {family: tiny_encoder.save_encoder(root / family, family) for family in tiny_encoder.FAMILIES}


@pytest.fixture
def bert(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


# Vectors


@pytest.mark.parametrize(("family", "name"), READABLE)
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_vectors_are_those_of_one_text_at_a_time(folders: dict[str, Path], family: str, name: str, budget: int) -> None:
    """Whatever the batch: `budget` 1 is one row per pass. The long text is cut, and keeps its special tokens."""
    model, template = load(folders[family], template=name), load_template(name)
    for side in SIDES:
        prompt, length = getattr(template, side).prefix, model.contract.length(side)
        expected = slow.encode(folders[family], TEXTS, template.pooling, length=length, prompt=prompt)
        assert worst(model.encode(TEXTS, side, token_budget=budget), expected) < 2e-6
        assert worst(model.encode(TEXTS[::-1], side, token_budget=budget), expected.flip(0)) < 2e-6


def test_vectors_as_they_are(folders: dict[str, Path]) -> None:
    model = load(folders["bert"], template="retromae")
    expected = slow.encode(folders["bert"], TEXTS, "cls", length=64, normalise=False)
    assert worst(model.encode(TEXTS, "query"), expected) < 1e-5
    assert float((expected.norm(dim=1) - 1).abs().min()) > 0.5


@pytest.mark.parametrize("name", ["e5", "cls"])
def test_the_side_that_a_tokenizer_pads_on_does_not_matter(bert: Path, name: str) -> None:
    expected = load(bert, template=name).encode(TEXTS, "passage")
    path = bert / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    model = load(bert, template=name)
    assert model.tokenizer.padding_side == "left"
    assert torch.equal(model.encode(TEXTS, "passage"), expected)


def test_half_precision_is_close(folders: dict[str, Path]) -> None:
    model = load(folders["modernbert"], template="e5")
    expected = model.encode(TEXTS, "passage")
    model.lm.to(torch.float16)
    found = model.encode(TEXTS, "passage")
    assert found.dtype == torch.float32
    assert worst(found, expected) < 0.01


def test_titles_are_joined_behind_the_prompt(folders: dict[str, Path]) -> None:
    retriever = Retriever.load(str(folders["bert"]), template="e5", device="cpu")
    found = torch.from_numpy(retriever.encode_passages(["the sky is blue"], titles=["Light"]))
    expected = slow.encode(folders["bert"], ["Light the sky is blue"], "mean", length=128, prompt="passage: ")
    assert worst(found, expected) < 1e-6


# Rows


@pytest.mark.parametrize("family", tiny_encoder.FAMILIES)
@pytest.mark.parametrize("side", SIDES)
def test_truncation_touches_only_the_text(family: str, side: SideName) -> None:
    words = tiny_encoder.tokenizer(family)
    bound = BoundTemplate(E5, words, bos=False)
    prompt = f"{side}: "
    for length in range(bound.overhead(side) + 1, 50, 4):
        for text, row in zip(TEXTS, bound.encode(TEXTS, side, length), strict=True):
            assert row == words(prompt + text, truncation=True, max_length=length)["input_ids"]
            assert row[0] == (words.cls_token_id if family != "t5" else row[0])
            assert row[-1] == (words.sep_token_id if family != "t5" else words.eos_token_id)
    with pytest.raises(
        ConfigError, match=f"leaves no room for text: template 'e5' itself takes {bound.overhead(side)}"
    ):
        bound.encode(TEXTS, side, bound.overhead(side))


@pytest.mark.parametrize("template", ENCODERS, ids=lambda template: template.name)
def test_what_a_text_becomes(template: Template) -> None:
    words = tiny_encoder.tokenizer()
    bound = BoundTemplate(template, words, bos=False)
    prompts = {
        "e5": ("query: ", "passage: "),
        "bge": ("Represent this sentence for searching relevant passages: ", ""),
    }
    for side, prompt in zip(SIDES, prompts.get(template.name, ("", "")), strict=True):
        assert bound.encode(["The sky"], side, 200) == [words(f"{prompt}The sky")["input_ids"]]
    assert (bound.query.slots, template.branches) == (0, False)
    assert Template.from_dict(template.to_dict(), "json") == template


@pytest.mark.parametrize("family", tiny_encoder.FAMILIES)
def test_a_text_cannot_spell_a_special_token(family: str) -> None:
    words = tiny_encoder.tokenizer(family)
    bound = BoundTemplate(MEAN, words, bos=False)
    (row,) = bound.encode(["a [CLS] b [SEP] </s> <s> <pad> [PAD]"], "query", 100)
    inside = row[len(bound.query.prefix) : -len(bound.query.suffix)]
    assert not set(inside) & (set(words.all_special_ids) - {words.unk_token_id})


OWN = """
name = "mine"
pooling = "mean"
normalise = false
[query]
prefix = "Q: "
[passage]
prefix = "P: "
suffix = " ."
"""


def test_own_template(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(OWN)
    model = load(folders["roberta"], template=str(path))
    assert model.contract.template.passage.joint
    assert (model.contract.pooling, model.contract.normalise, model.contract.causal) == ("mean", False, False)
    expected = slow.encode(folders["roberta"], TEXTS[:3], "mean", length=64, prompt="Q: ", normalise=False)
    assert worst(model.encode(TEXTS[:3], "query"), expected) < 1e-5
    words = model.tokenizer
    (row,) = model.bind().encode([TEXTS[0] * 9], "passage", 30)
    assert row[-3:] == [*words(" .", add_special_tokens=False)["input_ids"], words.sep_token_id][-3:]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"mean"', '"max"', "pooling must be one of mean_of_slots, cls, mean"),
        ("false", '"no"', "normalise must be true or false"),
        ('suffix = " ."', 'slots = ["{eos}"]', "[passage] slots are read of decoders; with pooling cls or mean, leave"),
        ('pooling = "mean"', "", '[query] slots must be a list of at least one token, such as ["{eos}"]'),
    ],
)
def test_bad_own_template(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "own.toml"
    assert old in OWN
    path.write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_template(str(path))
    assert message in str(caught.value)


def test_the_templates_of_decoders_are_written_as_before() -> None:
    assert set(Contract().to_dict()["template"]) == {"name", "query", "passage", "loss_scale"}
    assert RETROMAE.to_dict()["normalise"] is False
    assert CLS.to_dict()["pooling"] == "cls"


# Folders


@pytest.mark.parametrize(
    ("family", "template"), [("bert", BGE), ("roberta", E5), ("modernbert", RETROMAE), ("t5", MEAN)]
)
def test_saved_encoder_loads_bit_identically(
    family: str, template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_encoder.model(family, template, dim=12 if family == "t5" else None)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model", verify=True)
    assert again.contract == model.contract
    assert (again.contract.pooling, again.contract.causal) == (template.pooling, False)
    assert again.dim == (12 if family == "t5" else tiny.HIDDEN)
    assert torch.equal(again.encode(TEXTS, "query"), model.encode(TEXTS, "query"))
    assert not again.has_head
    before, after = model.lm.state_dict(), again.lm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "llara.json" not in capsys.readouterr().err


def reseal(folder: Path, **changes: Any) -> None:
    path = folder / "llara.json"
    record = json.loads(path.read_text())
    record["contract"].update(changes)
    del record["digest"]
    write_json_atomic(path, {**record, "digest": digest(record)})


def test_another_pooling_than_was_saved_is_found(tmp_path: Path) -> None:
    tiny_encoder.model("bert", CLS).save(tmp_path / "model")
    reseal(tmp_path / "model", pooling="mean")
    with pytest.raises(ModelError, match=r"llara\.json: pooling 'mean', causal False: not supported"):
        load(tmp_path / "model")
    reseal(tmp_path / "model", template=MEAN.to_dict())
    with pytest.raises(ModelError, match="the weights do not give the vectors they gave when saved"):
        load(tmp_path / "model")
    reseal(tmp_path / "model", template=CLS.to_dict(), pooling="cls", causal=True)
    with pytest.raises(ModelError, match=r"llara\.json: pooling 'cls', causal True: not supported"):
        load(tmp_path / "model")


def test_a_saved_encoder_keeps_its_template_outside_training(tmp_path: Path) -> None:
    tiny_encoder.model("bert", CLS).save(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^--template: .* was saved with template 'cls'"):
        load(tmp_path / "model", template="mean")
    config = ModelConfig(model=str(tmp_path / "model"), template="retromae")
    contract = load_model(config, for_training=True, new_template=True).contract
    assert (contract.template, contract.normalise, contract.causal) == (RETROMAE, False, False)


def test_write_contract_gives_a_published_encoder_one(bert: Path) -> None:
    contract = Contract(passage_length=70).with_template(E5)
    write_contract(bert, contract)
    assert load(bert, verify=True).contract == contract


def test_positions_begin_behind_that_of_padding(folders: dict[str, Path]) -> None:
    """RoBERTa's table of 128 positions has a row for padding and those before it."""
    model = load(folders["roberta"], template="cls")
    assert model.tokenizer.pad_token_id == 1
    assert (model.positions, model.contract.passage_length) == (126, 126)
    assert model.encode([TEXTS[0] * 30], "passage").shape == (1, tiny.HIDDEN)
    with pytest.raises(ConfigError, match="a passage length of 127 tokens is more than the 126 positions"):
        model.encode(TEXTS, "passage", max_length=127)
    assert load(folders["bert"], template="cls").positions == 128


def test_a_pooler_that_no_vector_is_read_from_is_left_out(folders: dict[str, Path]) -> None:
    names = dict(load(folders["bert"], template="cls").lm.named_parameters())
    assert names and not [name for name in names if "pooler" in name]


# Refusals


def test_an_encoder_is_refused_where_nobody_says_how_it_is_read(folders: dict[str, Path]) -> None:
    message = (
        r"is an encoder \(roberta\), whose positions see what stands after them; to encode, search or fine-tune with "
        r"it, say how its vectors are read: --template e5, bge, retromae, cls, mean, or a TOML file with pooling = "
        r'"cls" or "mean" \(adapt takes causal decoders alone\)$'
    )
    for weights in (True, False):
        with pytest.raises(ModelError, match=message):
            load_model(ModelConfig(model=str(folders["roberta"])), weights=weights)


def test_templates_are_for_one_kind_of_model(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--template: 'repllama' is for causal decoders, and .*bert is an encoder"):
        load(folders["bert"], template="repllama")
    base = tiny.save_base(tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"^--template: 'e5' is for encoders, and .*base is a causal decoder \(llama\)"
    ):
        load(base, template="e5")
    saved = tmp_path / "saved"
    tiny.model("llama").save(saved)
    with pytest.raises(ConfigError, match=r"^--template: 'e5' is for encoders"):
        load_model(ModelConfig(model=str(saved), template="e5"), for_training=True, new_template=True)
    tiny_encoder.model("bert").save(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=r"^--template: 'paper' is for causal decoders"):
        load_model(ModelConfig(model=str(tmp_path / "encoder"), template="paper"), new_template=True)


def test_a_decoder_by_another_name_is_found(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one with code of its own; here, an encoder that is made to look back only."""
    model = load(folders["bert"], template="cls")

    def backwards(**inputs: Any) -> Any:
        ids = inputs["input_ids"]
        states = model.lm.get_input_embeddings()(ids).cumsum(dim=1)
        return type("Output", (), {"last_hidden_state": states})()

    from llara.parity import check_direction

    monkeypatch.setattr(model.lm, "forward", backwards)
    with pytest.raises(ModelError, match=r"see nothing of what stands after them, so it is a causal decoder"):
        check_direction(model)


def test_bos_is_the_tokenizers_own_matter(folders: dict[str, Path]) -> None:
    assert not load(folders["roberta"], template="cls").contract.bos
    for bos in ("yes", "no"):
        with pytest.raises(ConfigError, match=r"^--bos: an encoder's text stands between its tokenizer's own special"):
            load(folders["roberta"], template="cls", bos=bos)


def test_cls_needs_a_token_in_front(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="puts no token in front of a text, and template 'cls' reads the first one"):
        load(folders["t5"], template="cls")


def test_an_encoder_that_cannot_be_had_alone(tmp_path: Path) -> None:
    words = tiny_encoder.tokenizer("roberta")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    BartModel(BartConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bart")
    words.save_pretrained(tmp_path / "bart")
    with pytest.raises(
        ModelError, match=r"is an encoder with a decoder \(bart\); of these, llara takes the encoders of"
    ):
        load(tmp_path / "bart", template="cls")


def test_a_model_that_does_not_heed_the_mask(tmp_path: Path) -> None:
    """FNet mixes all positions of a row, padding included."""
    words = tiny_encoder.tokenizer()
    settings = FNetConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=1, intermediate_size=8)
    FNetModel(settings).save_pretrained(tmp_path / "fnet")
    words.save_pretrained(tmp_path / "fnet")
    with pytest.raises(ModelError, match=r"depend on the padding beside a text|takes no token ids with a mask"):
        load(tmp_path / "fnet", template="cls")


def test_the_tokenizers_of_these_tests_add_special_tokens(folders: dict[str, Path]) -> None:
    for family, folder in folders.items():
        words = AutoTokenizer.from_pretrained(folder)
        added = len(words("the sky")["input_ids"]) - len(words("the sky", add_special_tokens=False)["input_ids"])
        assert added == (1 if family == "t5" else 2)
