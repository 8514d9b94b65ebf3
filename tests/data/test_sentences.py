"""Sentences end where a reader would say so, in any language, and in linear time."""

import gzip
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import regex

from llara.data.sentences import End, line_ends, sentence_ends
from tests.reference import sentences as slow


def parts(text: str, find: Callable[[str], list[End]] = sentence_ends) -> list[str]:
    starts = [0, *(end.start for end in find(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["The sky is blue. ", "Why?! ", '"It scatters light," he said. ', "It costs 3.50 (about 4.) today."],
        ["He moved to the U.S.A. in 1990, i.e. long ago. ", "(He came back.) ", "Nothing!"],
        [
            "서울은 대한민국의 수도이다. ",
            "인구는 약 940만 명이며, 면적은 605.2㎢이다. ",
            "정말 크지 않은가? ",
            "그렇다!",
        ],
        ["그는 “괜찮아.” ", "라고 말했다. ", "나는 웃었다."],
        [
            "北京是中国的首都。",
            "它有三千多年的历史！",
            "你去过吗？",
            "“我去过。”",
            "他说：“那里很大，有2.1万平方公里。”",
        ],
        ["東京は日本の首都です。", "「大きいですか？」", "「はい。」"],
        ["आकाश नीला है। ", "क्यों? ", "प्रकाश बिखरता है।"],
        ["السماء زرقاء. ", "لماذا؟ ", "لأن الضوء يتشتت."],
        ["Небо голубое. ", "Почему? ", "Свет рассеивается."],
        [
            "A title without a full stop\n\n",
            "A paragraph\nof two lines. ",
            "Its end\r\n\r\n",
            "Another\u2029",
            "The last",
        ],
    ],
)
def test_sentences_end_where_a_reader_says_so(sentences: list[str]) -> None:
    assert parts("".join(sentences)) == sentences


def test_an_end_leaves_white_space_between() -> None:
    text = "One.  \n Two.\tThree"
    assert [(text[: end.stop], text[end.start :]) for end in sentence_ends(text)] == [
        ("One.", "Two.\tThree"),
        ("One.  \n Two.", "Three"),
    ]


def test_neither_the_start_nor_the_end_of_a_text_is_an_end_in_it() -> None:
    for text in ("", " ", "\n\n", "One.", "\n\nOne. \n\n", "One", "...", "。"):
        assert sentence_ends(text) == [] and line_ends(text) == []


def test_lines_end_at_line_breaks() -> None:
    assert parts("one\ntwo\r\n\r\n three\u2028four\n", line_ends) == ["one\n", "two\r\n\r\n ", "three\u2028", "four\n"]


def test_the_slow_twin_finds_the_same_ends() -> None:
    rng = random.Random(0)
    alphabet = [
        *"aA1ñÉ한国ท.?!。！…‥,;:、-()[]“”‘’「」\"' \t\n\r\u00a0\u2028\u2029\u0301\u200d\u00ad😀*",
        "\n\n",
        ". ",
        ".\n",
    ]
    for _ in range(4000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(14)))
        if regex.search(r"[\r\n\u2028\u2029]\p{M}|[\r\n\u2028\u2029]\p{Cf}", text):
            continue  # a mark on a line break: the twin's rules are not made for it
        assert parts(text) == slow.sentences(text), ascii(text)


def test_real_text_is_parted_as_the_slow_twin_does(shared: Path) -> None:
    with gzip.open(shared / "data" / "wiki" / "articles.jsonl.gz", "rt", encoding="utf-8") as file:
        english = [json.loads(next(file))["text"][:700] for _ in range(6)]
    chinese = json.loads((shared / "data" / "xquad" / "xquad.zh.json").read_text(encoding="utf-8"))["data"]
    texts = [*english, *(article["paragraphs"][0]["context"][:400] for article in chinese[:6])]
    for text in texts:
        found = parts(text)
        assert found == slow.sentences(text)
        assert len(found) > 1
        assert max(map(len, found)) < 600


@pytest.mark.parametrize(
    "piece",
    ["a", "A. ", "a.", ".", ". ", ". 1", ".)", "(", '"', "?,", "1. a ", " ", "\n", "a\n", " \n", "\u0301.", "。"],
)
def test_long_text_of_any_kind_is_parted_in_time_that_grows_with_its_length(piece: str) -> None:
    def count(repeats: int) -> list[int]:
        return [len(find("A" + piece * repeats + "b")) for find in (sentence_ends, line_ends)]

    # If any of it were looked at again and again, this would take hours.
    few, more = count(10), count(20)
    assert count(200_010) == [a + (b - a) * 20_000 for a, b in zip(few, more, strict=True)]
