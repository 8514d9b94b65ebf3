from pathlib import Path
from typing import Any

import pytest

from llara.contract import Contract
from llara.errors import ConfigError, DataError, ModelError
from llara.hub import MINI
from llara.model import EmbeddingModel
from llara.templates import (
    DECODERS,
    EOS,
    PAPER,
    RELEASE,
    REPLLAMA,
    TEMPLATES,
    BoundTemplate,
    Side,
    SideName,
    Template,
    load_template,
    missing_tokens,
)
from tests import tiny

SIDES: tuple[SideName, ...] = ("query", "passage")
TEXTS = ("The sky is blue.", "", "漢字 and ünïcödé", "</s> <s1> <pad> {eos}", tiny.TEXT[0] * 5)


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer that has every slot token of every template."""
    made = tiny.tokenizer()
    made.add_tokens([f"<s{number}>" for number in range(1, 17)], special_tokens=True)
    return made


@pytest.fixture(scope="module")
def mini() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINI)


def plain(words: Any, text: str) -> list[int]:
    ids: list[int] = words(text, add_special_tokens=False)["input_ids"]
    return ids


# The built-in templates, spelled out


def test_paper(words: Any) -> None:
    bound = BoundTemplate(PAPER, words, bos=True)
    text = plain(words, "The sky")
    query = [words.bos_token_id, *text, *plain(words, " The next sentence: "), words.eos_token_id]
    passage = [words.bos_token_id, *text, *plain(words, " The original sentence: "), words.eos_token_id]
    assert bound.encode(["The sky"], "query", 200) == [query]
    assert bound.encode(["The sky"], "passage", 200) == [passage]
    assert (bound.query.slots, bound.passage.slots) == (1, 1)
    assert PAPER.branches
    assert PAPER.loss_scale == 1


def test_release(words: Any) -> None:
    bound = BoundTemplate(RELEASE, words, bos=False)
    text = [*plain(words, '"'), *plain(words, "The sky")]
    first = words.convert_tokens_to_ids([f"<s{number}>" for number in range(1, 9)])
    second = words.convert_tokens_to_ids([f"<s{number}>" for number in range(9, 17)])
    summarize = plain(words, '", summarize the above passage within eight words: ')
    predict = plain(words, '", predict the following passage within eight words: ')
    assert bound.encode(["The sky"], "passage", 200) == [[*text, *summarize, *first]]
    assert bound.encode(["The sky"], "query", 200) == [[*text, *predict, *second]]
    assert (bound.query.slots, bound.passage.slots) == (8, 8)
    assert RELEASE.branches
    assert RELEASE.loss_scale == 0.1


def test_repllama(words: Any) -> None:
    bound = BoundTemplate(REPLLAMA, words, bos=True)
    start, eos = words.bos_token_id, words.eos_token_id
    assert bound.encode(["The sky"], "query", 200) == [[start, *plain(words, "query: The sky"), eos]]
    assert bound.encode(["The sky"], "passage", 200) == [[start, *plain(words, "passage: The sky"), eos]]
    assert not REPLLAMA.branches


def test_joint_prefix_is_tokenised_with_its_text(words: Any) -> None:
    side = Side("Th", "", (EOS,), joint=True)
    joint = BoundTemplate(Template("own", side, side), words, bos=False)
    split = Side("Th", "", (EOS,))
    apart = BoundTemplate(Template("own", split, split), words, bos=False)
    assert joint.encode(["e sky"], "query", 50)[0][:-1] == plain(words, "The sky")
    assert apart.encode(["e sky"], "query", 50)[0][:-1] == [*plain(words, "Th"), *plain(words, "e sky")]
    assert joint.encode(["e sky"], "query", 50) != apart.encode(["e sky"], "query", 50)


def test_sides_are_branches_only_where_they_share_their_start() -> None:
    def own(query: Side, passage: Side) -> bool:
        return Template("own", query, passage).branches

    assert own(Side("x", "a", (EOS,)), Side("x", "b", (EOS,)))
    assert own(Side("x", "a", ("<s1>",)), Side("x", "a", ("<s2>",)))
    assert not own(Side("x", "a", (EOS,)), Side("y", "b", (EOS,)))
    assert not own(Side("x", "a", (EOS,), joint=True), Side("x", "b", (EOS,), joint=True))
    assert not own(Side("x", "a", (EOS,)), Side("x", "a", (EOS,)))


# Slots and ids come from the tokenizer


def test_ids_come_from_the_tokenizer(mini: Any) -> None:
    bound = BoundTemplate(PAPER, mini, bos=True)
    assert (mini.bos_token_id, mini.eos_token_id) == (1, 2)
    row = bound.encode(["The sky"], "passage", 64)[0]
    assert row == [1, *plain(mini, "The sky"), *plain(mini, " The original sentence: "), 2]
    other = BoundTemplate(PAPER, tiny.tokenizer(), bos=True).encode(["The sky"], "passage", 64)[0]
    assert (other[0], other[-1]) == (0, 1)


@pytest.mark.parametrize("bos", [True, False])
def test_bos_stands_in_front_once_or_not_at_all(words: Any, bos: bool) -> None:
    for template in DECODERS:
        bound = BoundTemplate(template, words, bos=bos)
        for side in SIDES:
            for row in bound.encode(TEXTS, side, 300):
                assert row.count(words.bos_token_id) == bos
                assert (row[0] == words.bos_token_id) == bos


def test_bos_without_a_bos_token_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the tokenizer has no BOS token; use --bos no"):
        BoundTemplate(PAPER, tiny.tokenizer(bos=False), bos=True)


@pytest.mark.parametrize("kind", ["bytes", "words", "mini"])
@pytest.mark.parametrize("text", ["</s>", "a </s> b", "<s1>", "<s9><s16>", "<s></s><pad>", "x</s>"])
def test_a_text_cannot_spell_a_slot(kind: str, text: str, mini: Any) -> None:
    words = mini if kind == "mini" else tiny.tokenizer(kind=kind)
    if kind != "mini":
        words.add_tokens([f"<s{number}>" for number in range(1, 17)], special_tokens=True)
    templates = (PAPER, REPLLAMA) if kind == "mini" else DECODERS
    special = {words.bos_token_id, words.eos_token_id, words.pad_token_id, *words.convert_tokens_to_ids(["<s1>"])}
    special -= {words.unk_token_id}
    for template in templates:
        bound = BoundTemplate(template, words, bos=False)
        for side in SIDES:
            row = bound.encode([text], side, 100)[0]
            assert not special & set(row[: -bound.side(side).slots])
            assert not special & set(bound.text_ids([text], side)[0])


# Truncation


@pytest.mark.parametrize("name", [template.name for template in DECODERS])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_truncation_touches_only_the_text(words: Any, name: str, bos: bool, side: SideName) -> None:
    bound = BoundTemplate(TEMPLATES[name], words, bos=bos)
    raw = TEMPLATES[name].query if side == "query" else TEMPLATES[name].passage
    start = [*([words.bos_token_id] if bos else []), *plain(words, raw.prefix)]
    slots = [words.eos_token_id if slot == EOS else words.convert_tokens_to_ids(slot) for slot in raw.slots]
    end = [*plain(words, raw.suffix), *slots]
    whole = bound.encode(TEXTS, side, 10_000)
    for length in range(bound.overhead(side) + 1, bound.overhead(side) + 140, 3):
        for row, full in zip(bound.encode(TEXTS, side, length), whole, strict=True):
            assert len(row) == min(length, len(full))
            assert row[-len(end) :] == end
            # A joint prefix may share its last token with the text.
            kept = len(start) - raw.joint
            assert row[:kept] == start[:kept]
            assert row[: -len(end)] == full[: len(row) - len(end)]
    assert len(start) + len(end) == bound.overhead(side)


@pytest.mark.parametrize("name", [template.name for template in DECODERS])
def test_length_without_room_for_text_is_refused(words: Any, name: str) -> None:
    bound = BoundTemplate(TEMPLATES[name], words, bos=True)
    for side in SIDES:
        overhead = bound.overhead(side)
        assert len(bound.encode(["The sky is blue"], side, overhead + 1)[0]) == overhead + 1
        for length in (0, 1, overhead - 1, overhead):
            message = rf"a {side} length of {length} tokens leaves no room.*{name!r} itself takes {overhead}"
            with pytest.raises(ConfigError, match=message):
                bound.encode(["The sky is blue"], side, length)


def test_no_texts_give_no_rows(words: Any) -> None:
    assert BoundTemplate(PAPER, words, bos=True).encode([], "query", 64) == []


# Missing special tokens


def test_missing_tokens_are_named_in_slot_order() -> None:
    plain_words = tiny.tokenizer()
    assert missing_tokens(PAPER, plain_words) == []
    assert missing_tokens(RELEASE, plain_words) == [f"<s{number}>" for number in range(1, 17)]
    assert missing_tokens(PAPER, tiny.tokenizer(eos=False)) == ["</s>"]
    plain_words.add_tokens(["<s2>"], special_tokens=True)
    assert "<s2>" not in missing_tokens(RELEASE, plain_words)


def test_a_tokenizer_without_the_slot_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lacks <s1>, <s2>.*slot tokens of template 'release'.*fine-tuning add them"):
        BoundTemplate(RELEASE, tiny.tokenizer(), bos=False)
    with pytest.raises(ModelError, match=r"lacks </s>, the slot tokens of template 'paper'"):
        BoundTemplate(PAPER, tiny.tokenizer(eos=False), bos=False)


def made(template: Template, **tokens: bool) -> EmbeddingModel:
    words = tiny.tokenizer(**tokens)
    return tiny.model("llama", words=words, contract=Contract(template=template, bos=words.bos_token_id is not None))


def test_missing_tokens_are_added_and_embeddings_resized() -> None:
    model = made(RELEASE)
    before = model.lm.get_input_embeddings().weight.detach().clone()
    new = model.add_missing_tokens()
    rows = model.lm.get_input_embeddings().weight
    assert new == list(range(len(before), len(before) + 16))
    assert rows.shape[0] == len(before) + 16 == model.lm.get_output_embeddings().weight.shape[0]
    assert rows[: len(before)].equal(before)
    assert model.bind().encode(["x"], "passage", 100)[0][-8:] == new[:8]
    assert model.encode(["x", "y"], "query").shape == (2, model.dim)
    assert model.add_missing_tokens() == []


def test_missing_eos_is_added() -> None:
    model = made(PAPER, eos=False)
    (new,) = model.add_missing_tokens()
    assert model.tokenizer.eos_token == "</s>"
    assert model.tokenizer.eos_token_id == new
    assert model.bind().encode(["x"], "query", 100)[0][-1] == new
    assert model.encode(["x"], "query").shape == (1, model.dim)


def test_spare_rows_of_the_embeddings_are_used_before_more_are_added() -> None:
    words = tiny.tokenizer()
    lm = tiny.language_model("llama", len(words) + 20)
    model = EmbeddingModel(lm, words, Contract(template=RELEASE, bos=True), "", "tiny")
    assert model.add_missing_tokens() == list(range(len(words) - 16, len(words)))
    assert lm.get_input_embeddings().weight.shape[0] == len(words) - 16 + 20


# A template of one's own

GOOD = """
name = "mine"
loss_scale = 0.5
[query]
prefix = "Q "
suffix = " =>"
slots = ["{eos}"]
[passage]
prefix = "Q "
slots = ["<p1>", "<p2>"]
joint = false
"""


def written(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_own_template_from_toml(tmp_path: Path) -> None:
    template = load_template(written(tmp_path, GOOD))
    assert template == Template("mine", Side("Q ", " =>", (EOS,)), Side("Q ", "", ("<p1>", "<p2>")), 0.5)
    assert template.branches
    assert Template.from_dict(template.to_dict(), "json") == template
    words = tiny.tokenizer()
    words.add_tokens(["<p1>", "<p2>"], special_tokens=True)
    row = BoundTemplate(template, words, bos=False).encode(["x"], "passage", 20)[0]
    assert row == [*plain(words, "Q "), *plain(words, "x"), *words.convert_tokens_to_ids(["<p1>", "<p2>"])]


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_by_name(name: str) -> None:
    assert load_template(name) is TEMPLATES[name]
    assert Template.from_dict(TEMPLATES[name].to_dict(), "json") == TEMPLATES[name]


BAD = {
    "no name": ('name = "mine"', "", "name must be a string"),
    "empty name": ('name = "mine"', 'name = ""', "name must be a string"),
    "unknown key": ("loss_scale", "loss_scal", "unknown key 'loss_scal' (did you mean 'loss_scale'?)"),
    "unknown key in a side": ('suffix = " =>"', 'sufix = ""', "[query]: unknown key 'sufix' (did you mean 'suffix'?)"),
    "scale of zero": ("loss_scale = 0.5", "loss_scale = 0", "loss_scale must be a number above 0"),
    "scale of text": ("loss_scale = 0.5", 'loss_scale = "1"', "loss_scale must be a number above 0"),
    "scale of true": ("loss_scale = 0.5", "loss_scale = true", "loss_scale must be a number above 0"),
    "scale of nan": ("loss_scale = 0.5", "loss_scale = nan", "loss_scale must be a number above 0"),
    "scale of infinity": ("loss_scale = 0.5", "loss_scale = inf", "loss_scale must be a number above 0"),
    "prefix of a number": ('prefix = "Q "\nsuffix', "prefix = 1\nsuffix", "[query] prefix and suffix must be strings"),
    "no slots": ('slots = ["{eos}"]', "", '[query] slots must be a list of at least one token, such as ["{eos}"]'),
    "empty slots": ('slots = ["{eos}"]', "slots = []", "[query] slots must be a list of at least one token"),
    "slots as text": ('slots = ["{eos}"]', 'slots = "{eos}"', "[query] slots must be a list of at least one token"),
    "empty slot": ('slots = ["{eos}"]', 'slots = [""]', "[query] slots must be a list of at least one token"),
    "joint as text": ("joint = false", 'joint = "no"', "[passage] joint must be true or false"),
    "no side": ("[passage]", "[passages]", "[passage] is missing; it needs prefix, suffix and slots"),
    "side of another kind": ("[passage]", "[[passage]]", "[passage] is missing; it needs prefix, suffix and slots"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD.values(), ids=BAD.keys())
def test_bad_own_template(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_template(path)
    assert message in str(caught.value)
    assert all(problem.startswith(path) for problem in caught.value.problems)


def test_all_faults_of_a_template_come_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, 'nam = "x"\nloss_scale = -1\n[query]\nslots = []\njoint = 1\n[passage]\nprefix = 2\n')
    with pytest.raises(ConfigError) as caught:
        load_template(path)
    assert caught.value.problems == (
        f"{path}: unknown key 'nam' (did you mean 'name'?)",
        f"{path}: name must be a string",
        f"{path}: loss_scale must be a number above 0",
        f"{path}: [query] joint must be true or false",
        f'{path}: [query] slots must be a list of at least one token, such as ["{{eos}}"]',
        f"{path}: [passage] prefix and suffix must be strings",
        f'{path}: [passage] slots must be a list of at least one token, such as ["{{eos}}"]',
    )


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "name = [")
    with pytest.raises(DataError, match=r"own\.toml: is not valid TOML: "):
        load_template(path)
    (tmp_path / "own.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(DataError, match=r"own\.toml: is not valid TOML: .*utf-8"):
        load_template(path)


def test_unknown_template_names_the_nearest() -> None:
    message = (
        r"--template: 'papr' is neither a file nor one of paper, release, repllama, e5, .* \(did you mean 'paper'\?\)"
    )
    with pytest.raises(ConfigError, match=message):
        load_template("papr")
