"""Templates of rerankers: which tokens a query and a document become, and what is cut."""

from pathlib import Path
from typing import Any

import pytest

from llara.errors import ConfigError, DataError, ModelError
from llara.pairs import RANKLLAMA, RANKLLAMA_V1, PairContract, PairEncoder, PairTemplate, load_pair_template
from tests import tiny

QUERY, DOCUMENT = "why is the sky blue", "Air scatters short wavelengths of light"


def encoder(words: Any = None, **contract: Any) -> PairEncoder:
    return PairEncoder(
        PairContract(**{"bos": True, "query_length": 30, "length": 90, **contract}), words or tiny.tokenizer()
    )


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_both_texts_are_one_string_that_ends_with_eos(kind: str) -> None:
    words = tiny.tokenizer(kind=kind)
    rows = encoder(words).rows([QUERY, QUERY], [DOCUMENT, "Read a file."])
    for row, document in zip(rows, (DOCUMENT, "Read a file."), strict=True):
        ids = words(f"query: {QUERY} document: {document}", add_special_tokens=False)["input_ids"]
        assert row == [words.bos_token_id, *ids, words.eos_token_id]
    assert encoder(words, bos=False).rows([QUERY], ["Read a file."])[0] == rows[1][1:]
    assert encoder(words).rows([], []) == []


def test_the_published_form_puts_each_part_behind_bos_without_eos() -> None:
    words = tiny.tokenizer()
    (row,) = encoder(words, template=RANKLLAMA_V1).rows([QUERY], [DOCUMENT])
    parts = [
        words(text, add_special_tokens=False)["input_ids"] for text in (f"query: {QUERY}", f"document: {DOCUMENT}")
    ]
    assert row == [words.bos_token_id, *parts[0], words.bos_token_id, *parts[1]]


@pytest.mark.parametrize("template", [RANKLLAMA, RANKLLAMA_V1], ids=lambda template: template.name)
@pytest.mark.parametrize("query", [QUERY * 20, "为什么天空是蓝色的" * 20, QUERY])
def test_the_query_is_cut_to_its_length_and_the_document_to_the_rest(template: PairTemplate, query: str) -> None:
    words = tiny.tokenizer()
    found = encoder(words, template=template)
    (row,) = found.rows([query], [DOCUMENT * 20])
    asked = words("query: " + query, add_special_tokens=False)["input_ids"]
    assert len(row) == 90
    assert row[1 : 1 + min(len(asked), 28)] == asked[:28]
    assert (row[-1] == words.eos_token_id) == bool(template.end)
    prompt = words(template.document, add_special_tokens=False)["input_ids"]
    begins = [at for at in range(len(row)) if row[at : at + len(prompt)] == prompt]
    assert begins and begins[0] <= 1 + 30 + (template == RANKLLAMA_V1)
    assert words.decode(row[begins[0] :]).strip().startswith("document: Air scatters short")


def test_a_text_that_spells_eos_places_none() -> None:
    words = tiny.tokenizer()
    (row,) = encoder(words).rows(["</s>"], ["<s> </s>"])
    assert row.count(words.eos_token_id) == 1 and row.count(words.bos_token_id) == 1


def test_what_the_tokenizer_or_the_lengths_lack_is_named() -> None:
    with pytest.raises(ModelError, match=r"lacks an EOS token, with which template 'rankllama' ends"):
        encoder(tiny.tokenizer(eos=False))
    with pytest.raises(ModelError, match=r"lacks <x>"):
        encoder(template=PairTemplate("mine", "a", "b", ("<x>",)))
    with pytest.raises(ModelError, match="has no BOS token"):
        encoder(tiny.tokenizer(bos=False))
    with pytest.raises(
        ConfigError, match=r"a length of 30 tokens leaves no room for a document: query and prompts take"
    ):
        encoder(length=30)
    with pytest.raises(ConfigError, match="a query length of 2 tokens leaves no room"):
        encoder(query_length=2)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    assert load_pair_template("rankllama") is RANKLLAMA
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nquery = "Q "\ndocument = " D "\nend = ["</s>"]\n')
    template = load_pair_template(str(file))
    assert template == PairTemplate("mine", "Q ", " D ", ("</s>",))
    assert PairTemplate.from_dict(template.to_dict(), "x") == template
    contract = PairContract(template=template, bos=True, title_separator=None, length=99)
    assert PairContract.from_dict(contract.to_dict(), "x") == contract
    file.write_text('name = 3\nquerry = "Q "\ndocument = " D "\nend = "</s>"\njoint = 1\n')
    with pytest.raises(ConfigError) as caught:
        load_pair_template(str(file))
    for said in (
        "name must be",
        "unknown key 'querry' (did you mean 'query'?)",
        "query must be",
        "end must",
        "joint must",
    ):
        assert said in str(caught.value)
    file.write_text("name = ")
    with pytest.raises(DataError, match="is not valid TOML"):
        load_pair_template(str(file))
    with pytest.raises(ConfigError, match=r"neither a file nor .* \(did you mean 'rankllama'\?\)"):
        load_pair_template("rankllam")
    with pytest.raises(ModelError, match="do not fit this version of llara: extra"):
        PairContract.from_dict({**contract.to_dict(), "extra": 1}, "x")
