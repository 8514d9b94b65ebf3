"""Texts are cut at the ends of sentences, in any language and with any tokenizer, and no token is lost."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.normalizers import NFKC
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import UnigramTrainer
from transformers import PreTrainedTokenizerFast

from llara.config import ModelConfig
from llara.loading import load_model
from llara.training import cutting
from llara.training.cutting import Tokens, cut, join, parts_of, sentences_of, tokenise
from llara.training.prepare import chunks_of
from tests import tiny
from tests.reference.chunks import cut_document

KOREAN = (
    "서울은 대한민국의 수도이자 최대 도시이다. 한강을 끼고 있으며, 인구는 약 940만 명이다. "
    "조선 시대에는 한양이라고 불렸다! 지금은 어떤 모습일까? 고층 건물과 오래된 궁궐이 함께 서 있다. "
    "많은 사람이 지하철을 타고 출근한다. 봄에는 벚꽃이 피고, 겨울에는 눈이 내린다."
)
ENGLISH = (
    "The sky is blue because air scatters short wavelengths of light more than long ones. Why is that so? "
    "Molecules are much smaller than 0.5 micrometres, i.e. than the light itself! At sunset the path is longer. "
    "Then the blue has gone elsewhere, and what is left is red.\n\nA second paragraph begins here. It ends soon."
)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer of another kind: words begin with a mark, and characters are normalised."""
    core = Tokenizer(Unigram())
    core.normalizer = NFKC()
    core.pre_tokenizer, core.decoder = Metaspace(), MetaspaceDecoder()
    trainer: Any = UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    core.train_from_iterator([*tiny.TEXT, KOREAN, ENGLISH], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


class Slow:
    """A tokenizer that cannot say where its tokens stand: one id per character."""

    is_fast = False

    def __call__(self, texts: Sequence[str], *, return_offsets_mapping: bool = False, **_: Any) -> dict[str, Any]:
        assert not return_offsets_mapping
        return {"input_ids": [[ord(char) for char in text] for text in texts]}


def whole(text: str, tokenizer: Any) -> Tokens:
    """The tokens of a text, as preparation takes them."""
    return join(tokenise(parts_of(text, sentences=True), tokenizer))


def pieces(tokens: Tokens, length: int, shortest: int = 1) -> list[list[int]]:
    cuts = cut(len(tokens.ids), tokens.sentences, tokens.lines, length, shortest)
    return [tokens.ids[start:end].tolist() for start, end in itertools.pairwise(cuts)]


def in_text(text: str, found: list[list[int]], tokenizer: Any) -> list[str]:
    """What the pieces say, which is what the text says when they are put together."""
    assert "".join(tokenizer.decode([*itertools.chain(*found)]).split()) == "".join(text.split())
    return [tokenizer.decode(piece).strip() for piece in found]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 23, 24, 80])
@pytest.mark.parametrize("shortest", [1, 3, 8, 9])
def test_a_document_is_cut_like_the_slow_twin(count: int, shortest: int) -> None:
    rng = random.Random(count)
    ids = list(range(100, 100 + count))
    for rate in (0.0, 0.1, 0.3, 1.0):
        sentences, lines = ([end for end in range(1, count) if rng.random() < rate] for _ in range(2))
        spans = chunks_of(cut(count, sentences, lines, 8, shortest), shortest)
        found = [(ids[start:end], ids[end:last]) for start, end, last in spans.tolist()]
        assert found == cut_document(ids, 8, shortest, sentences, lines)


def test_a_chunk_ends_with_the_last_sentence_that_fits() -> None:
    assert cut(20, [3, 6, 9, 15], [], 8, 1) == [0, 6, 9, 15, 20]
    assert cut(8, [3, 6], [], 8, 1) == [0, 8]  # fits as it is
    assert cut(20, [8, 16], [], 8, 1) == [0, 8, 16, 20]


def test_a_sentence_longer_than_a_chunk_is_cut() -> None:
    assert cut(30, [20], [], 8, 1) == [0, 8, 16, 20, 28, 30]


def test_an_end_that_leaves_too_little_is_passed_over() -> None:
    assert cut(20, [2, 10], [], 8, 4) == [0, 8, 16, 20]
    assert cut(20, [2, 12], [], 8, 4) == [0, 8, 12, 20]


def test_a_line_ends_a_chunk_where_no_sentence_does() -> None:
    assert cut(20, [], [5, 12, 14], 8, 1) == [0, 5, 12, 20]
    assert cut(20, [4], [7], 8, 1) == [0, 4, 7, 15, 20]
    assert cut(20, [2], [7], 8, 4) == [0, 7, 15, 20]


def test_a_short_last_chunk_is_only_a_next_text() -> None:
    assert chunks_of([0, 8, 16, 18], 4).tolist() == [[0, 8, 16], [8, 16, 18]]
    assert chunks_of([0, 3], 4).tolist() == []
    assert chunks_of([0, 8, 16], 4).tolist() == [[0, 8, 16], [8, 16, 16]]  # the last one has no next text
    assert chunks_of([0, 0], 1).tolist() == []


@pytest.mark.parametrize("text", [ENGLISH, KOREAN], ids=["english", "korean"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "mini"])
def test_chunks_of_real_text_are_whole_sentences(text: str, kind: str) -> None:
    if kind == "mini":
        tokenizer = load_model(ModelConfig(model="mini", device="cpu", offline=True)).tokenizer
    else:
        tokenizer = tiny.tokenizer() if kind == "bytes" else sentencepiece()
    tokens = whole(text, tokenizer)
    ends = [0, *tokens.sentences, len(tokens.ids)]
    longest = max(end - start for start, end in itertools.pairwise(ends))
    for length in (longest, 2 * longest):
        texts = in_text(text, pieces(tokens, length), tokenizer)
        assert len(texts) > 1
        assert all(each[-1] in ".!?" for each in texts)
        assert all(each[0].isupper() or each[0] > "가" for each in texts)


def test_chunks_of_chinese_are_whole_sentences(shared: Path) -> None:
    data = json.loads((shared / "data" / "xquad" / "xquad.zh.json").read_text(encoding="utf-8"))["data"]
    tokenizer = tiny.tokenizer()
    ends = []
    for paragraph in itertools.islice((each for article in data for each in article["paragraphs"]), 120):
        tokens = whole(paragraph["context"], tokenizer)
        ends += [text[-1] for text in in_text(paragraph["context"], pieces(tokens, 400), tokenizer)[:-1]]
    assert len(ends) > 40
    # In bytes, a few sentences are longer than 400.
    assert sum(end in "\u3002\uff1f\uff01.\u201d\uff09" for end in ends) > 0.9 * len(ends)


def test_nothing_is_lost_of_any_text() -> None:
    rng = random.Random(0)
    alphabet = [*"aB1é한国。.?! \n\t“”😀́ﬁ\u200d", ". ", "\n\n", " the"]
    tokenizers = [tiny.tokenizer(), sentencepiece()]
    for number in range(300):
        tokenizer = tokenizers[number % 2]
        text = "".join(rng.choices(alphabet, k=rng.randrange(80)))
        tokens = whole(text, tokenizer)
        length, shortest = rng.randrange(1, 20), rng.randrange(1, 6)
        found = pieces(tokens, length, shortest)
        assert all(0 < len(piece) <= length for piece in found[:-1])
        assert all(len(piece) >= min(shortest, length) for piece in found[:-1])
        plain = tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
        assert list(itertools.chain(*found)) == tokens.ids.tolist() == plain
        cuts = chunks_of(cut(len(tokens.ids), tokens.sentences, tokens.lines, length, shortest), shortest)
        chunks = [(plain[start:end], plain[end:last]) for start, end, last in cuts.tolist()]
        assert chunks == cut_document(plain, length, shortest, tokens.sentences, tokens.lines)


def test_a_slow_tokenizer_takes_sentence_by_sentence() -> None:
    tokens = join(tokenise(sentences_of(ENGLISH), Slow()))
    assert "".join(map(chr, tokens.ids)) == ENGLISH
    texts = ["".join(map(chr, piece)) for piece in pieces(tokens, 200)]
    assert "".join(texts) == ENGLISH
    assert all(text.strip()[-1] in ".!?" for text in texts)


@pytest.mark.parametrize("sentences", [True, False])
def test_a_very_long_text_is_tokenised_in_parts(sentences: bool) -> None:
    text = f"{ENGLISH} {KOREAN} {ENGLISH}"
    found, one = (parts_of(text, sentences=sentences, longest=longest) for longest in (250, 10_000))
    assert "".join(part.text for part in found) == text and len(one) == 1
    assert all(len(part.text) <= 250 for part in found)
    assert all(part.text.strip()[-1] in ".!?" for part in found)
    many, whole_text = (join(tokenise(parts, tiny.tokenizer())) for parts in (found, one))
    # This tokenizer has no token that holds the end of a sentence and more.
    assert many.ids.tolist() == whole_text.ids.tolist()
    if sentences:
        assert pieces(many, 200) == pieces(whole_text, 200)


def test_a_long_text_without_sentences_is_parted_all_the_same() -> None:
    for text in ("x" * 700, ("y" * 99 + "\n") * 8):
        found = parts_of(text, sentences=True, longest=250)
        assert [len(part.text) for part in found] == ([250, 250, 200] if "x" in text else [199, 200, 200, 201])
        assert "".join(part.text for part in found) == text


def test_only_ends_inside_a_text_count() -> None:
    for text in ("", " ", "One.", "\n\nOne.\n\n"):
        tokens = whole(text, tiny.tokenizer())
        assert tokens.sentences == [] and tokens.lines == []


def test_a_token_over_an_end_belongs_before_it_and_white_space_after_it() -> None:
    def places(*starts: int) -> list[int]:
        return cutting._positions([cutting.End(3, 4), cutting.End(8, 8)], np.array(starts))

    assert places(0, 3, 7, 10) == [1, 3]  # "One", " two", ". x", "y": the third reaches over the second end
    assert places(0, 3, 4, 8) == [1, 3]  # "One", " ", "two.", "x"
    assert places(0, 2, 9) == [2]  # "On", "e two. ", "x": both ends are in the second


def test_a_text_cannot_spell_a_special_token() -> None:
    tokenizer = tiny.tokenizer()
    (tokens,) = tokenise(parts_of("a </s> b. C <s>", sentences=True), tokenizer)
    assert not set(tokens.ids.tolist()) & set(tokenizer.all_special_ids)
