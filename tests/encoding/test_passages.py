"""Long documents as passages: where they are cut, against the slow twin, and what holds wherever that is."""

import itertools
import random

import pytest

from llara.encoding.passages import Cutter
from llara.errors import ConfigError, ModelError
from llara.model import EmbeddingModel
from llara.records import Document
from llara.templates import tokenize
from tests import tiny
from tests.reference import passages as reference

WORDS = " ".join(tiny.TEXT).split()


def cutter(model: EmbeddingModel, length: int, overlap: int = 0) -> Cutter:
    return Cutter(model.bind(), model.contract.join_title, length, overlap)


def made_up(seed: int, sentences: int, paragraphs: bool = False) -> str:
    rng = random.Random(seed)
    found = []
    for _ in range(sentences):
        words = rng.choices([*WORDS, "naïve", "漢字"], k=rng.randint(1, 12))
        found.append(
            " ".join(words).capitalize() + rng.choice([". ", "? ", "!\n", ".  ", "\n\n" if paragraphs else ". "])
        )
    return "".join(found)


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model("llama")


def texts_of(document: Document, made: tuple[str, list[tuple[int, int]]]) -> list[str]:
    return [document.text[start:stop] for start, stop in made[1]]


@pytest.mark.parametrize("overlap", [0, 1, 6])
@pytest.mark.parametrize("length", [40, 64, 120])
@pytest.mark.parametrize("seed", range(4))
def test_passages_are_those_of_the_slow_twin(model: EmbeddingModel, length: int, overlap: int, seed: int) -> None:
    text, title = made_up(seed, 14, paragraphs=seed % 2 == 1), "A tokenizer" if seed % 2 else ""
    if seed == 3:
        text = text.replace(". ", " ").replace("? ", " ").replace("!", "")  # few sentences: lines, and words
    made = cutter(model, length, overlap)
    head = model.contract.join_title(title, "x")[:-1]

    def count(piece: str) -> int:
        return len(tokenize(model.tokenizer, [head + piece])[0])

    found = made.spans(Document("d", text, title))
    assert found == (title, reference.cut(text, made.room, overlap, count))
    assert len(found[1]) > 1


@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize(
    "text",
    [
        made_up(7, 60),
        "x" * 700,
        "漢字" * 200,
        "a b " * 300,
        "word\n" * 200,
        "é" * 300 + " end",
        made_up(8, 30) + " " * 900,
    ],
)
def test_nothing_is_lost_and_everything_fits(model: EmbeddingModel, text: str, overlap: int) -> None:
    made = cutter(model, 48, overlap)
    title, spans = made.spans(Document("d", text, "Of the sky"))
    assert title == "Of the sky" and len(spans) > 3
    covered = [False] * len(text)
    for (start, stop), before in zip(spans, [None, *spans], strict=False):
        assert start < stop and (before is None or (start > before.start and stop > before.stop))
        covered[start:stop] = [True] * (stop - start)
        (row,) = model.bind().encode([model.contract.join_title(title, text[start:stop])], "passage", 1000)
        assert len(row) <= 48
    assert not "".join(char for char, there in zip(text, covered, strict=True) if not there).strip()
    repeated = sum(one.stop - other.start for one, other in itertools.pairwise(spans) if other.start < one.stop)
    assert (repeated > 0) == (overlap > 0 and len(text.split()) > 2)


def test_what_fits_stays_whole(model: EmbeddingModel) -> None:
    made = cutter(model, 64)
    for document in (
        Document("d", "The sky is blue.  "),
        Document("d", "", "A title alone " * 40),
        Document("d", "Short.", "A title"),
        Document("d", " " * 3000 + "x"[:0], "A title"),
    ):
        assert made.spans(document) == (document.title, [(0, len(document.text))])


def test_a_passage_ends_with_a_sentence_unless_that_leaves_it_short(model: EmbeddingModel) -> None:
    made = cutter(model, 70)
    document = Document("d", "Why is the sky blue? Read a file line by line. " * 8)
    assert all(text[-1] in ".?" for text in texts_of(document, made.spans(document)))
    document = Document("d", "No. " + "read a file line by line and " * 20)
    first = texts_of(document, made.spans(document))[0]
    assert first.startswith("No. read") and not first.endswith(".") and len(first.split()) > 5


def test_a_long_title_is_shortened_where_the_document_is_cut(model: EmbeddingModel) -> None:
    made, long = cutter(model, 64), "The sky is blue " * 30
    title, spans = made.spans(Document("d", "Read a file line by line. " * 20, long))
    assert long.startswith(title) and len(tokenize(model.tokenizer, [title])[0]) <= made.room // 2
    assert len(spans) > 3


def test_documents_become_a_table(model: EmbeddingModel) -> None:
    documents = [
        Document("a", "Short."),
        Document("b", "Read a file line by line. " * 9, "T"),
        Document("c", "", "Only"),
    ]
    found = cutter(model, 48).cut(documents)
    assert found.table.shape == (len(found.texts), 3) and found.table[:, 0].tolist() == sorted(
        found.table[:, 0].tolist()
    )
    assert found.texts == [documents[n].text[a:b] for n, a, b in found.table.tolist()]
    assert found.titles == [documents[n].title for n in found.table[:, 0].tolist()]
    assert cutter(model, 48).cut([]).table.shape == (0, 3)


def test_settings_that_leave_no_room(model: EmbeddingModel) -> None:
    with pytest.raises(ConfigError, match=r"--overlap: at most a quarter of a passage's \d+ tokens, which is"):
        cutter(model, 48, 30)
    with pytest.raises(ConfigError, match="leaves no room for text"):
        cutter(model, 4)


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(
    model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model.tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="use --long truncate"):
        cutter(model, 48)
