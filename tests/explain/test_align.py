"""What the alignment is worth: near 1 where embeddings name their texts, at chance where they do not."""

import numpy as np
import pytest
import torch

from llara.config import ModelConfig
from llara.contract import Contract
from llara.data.docstrings import read_docstrings
from llara.errors import DataError
from llara.explain.align import Alignment, Slots, collect, first_component, measure
from llara.explain.job import PACKAGES
from llara.lexical import TermOptions, TermReader
from llara.loading import load_model
from llara.templates import RELEASE
from tests import tiny
from tests.reference import components

TEXTS = [*tiny.TEXT, "", "short", "a b c d e", tiny.TEXT[0] * 3]


def reader(fold: bool = False) -> TermReader:
    model = tiny.model("llama", contract=Contract(template=RELEASE, bos=True))
    model.add_missing_tokens()
    return TermReader(model, TermOptions(fold=fold))


def naming(reader: TermReader, own: list[list[int]]) -> torch.Tensor:
    """Slots [n, 1, D] whose largest logits are those of a text's own tokens."""
    head = reader.model.lm.get_output_embeddings().weight.detach().double()
    wanted = torch.zeros(len(own), len(head), dtype=torch.float64)
    for number, ids in enumerate(own):
        wanted[number, ids] = 1.0
    return (wanted @ torch.linalg.pinv(head).T)[:, None].float()


def test_embeddings_that_name_their_texts_are_aligned() -> None:
    found = reader()
    own = [[60 + number] for number in range(20)]  # one token each, so that 32 dimensions have room to name it
    result = measure(found, Slots(naming(found, own), own), "here")
    assert (result.recall, result.chance, result.texts) == (1.0, 0.0, 20)
    assert not result.near_chance and result.gain == 1.0


def test_embeddings_of_something_else_are_at_chance() -> None:
    found = reader()
    own = [[60 + number % 7, 80 + number % 5, 100 + number] for number in range(40)]
    slots = torch.randn(40, 2, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    result = measure(found, Slots(slots, own), "here")
    assert abs(result.recall - result.chance) < 0.1
    assert result.near_chance


@pytest.mark.parametrize("fold", [False, True])
def test_the_alignment_is_that_of_the_slow_twin(fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reader(fold)
    sample = collect(found.model, TEXTS, "passage", 60, None)
    assert sample.slots.shape == (len(TEXTS), 8, tiny.HIDDEN)
    monkeypatch.setattr("llara.lexical.MOST_LOGITS", 3 * 8 * len(found.counted))  # three texts at a time
    result = measure(found, sample, "here")
    terms = [set(found.own_terms(own)) for own in sample.own]
    kept = [number for number, each in enumerate(terms) if each]
    assert len(kept) == len(TEXTS) - 1 == result.texts  # one text is empty
    rows = {number: found.logits(sample.slots[number : number + 1])[0].tolist() for number in kept}
    others = dict(zip(kept, [*kept[len(kept) // 2 :], *kept[: len(kept) // 2]], strict=True))
    own = np.array([components.recall(rows[number], terms[number]) for number in kept])
    other = np.array([components.recall(rows[number], terms[others[number]]) for number in kept])
    assert result.recall == pytest.approx(own.mean(), abs=1e-6)
    assert result.chance == pytest.approx(other.mean(), abs=1e-6)
    assert result.error == pytest.approx((own - other).std(ddof=1) / len(kept) ** 0.5, abs=1e-6)


def test_slots_are_those_that_the_vectors_are_the_mean_of() -> None:
    model = reader().model
    sample = collect(model, TEXTS, "query", 50, None)
    means = torch.nn.functional.normalize(sample.slots.mean(dim=1), dim=-1)
    assert torch.allclose(means, model.encode(TEXTS, "query"), atol=1e-5)


def test_the_component_is_that_of_the_slow_twin() -> None:
    slots = torch.randn(30, 3, 16, generator=torch.Generator().manual_seed(2)) + torch.linspace(0, 1, 16)
    direction, share = first_component(slots)
    expected, expected_share = components.first_component(slots.double().numpy())
    assert abs(float(direction.double().numpy() @ expected)) == pytest.approx(1.0, abs=1e-6)  # but for its sign
    assert share == pytest.approx(expected_share, abs=1e-6)


def test_nothing_is_left_along_a_removed_component() -> None:
    found = reader()
    sample = collect(found.model, TEXTS, "passage", None, None)
    direction, _ = first_component(sample.slots)
    moved = sample.slots + 5 * direction  # along the component, texts may lie anywhere
    without = found.without(direction)
    assert torch.allclose(without.logits(moved), without.logits(sample.slots), atol=1e-3)


def test_a_base_model_is_at_chance() -> None:
    """`mini` was never adapted: its slots say the same of every text."""
    model = load_model(ModelConfig(model="mini", device="cpu"))
    rows = read_docstrings(PACKAGES[:1])
    texts = [row.body for row in rows[::2][:24]]
    assert len(texts) == 24
    result = measure(TermReader(model, TermOptions(fold=True)), collect(model, texts, "passage", None, None), "here")
    assert result.near_chance and 0 < result.chance < 0.5


@pytest.mark.parametrize(
    ("recall", "chance", "error", "near"),
    [(0.3, 0.2, 0.01, False), (0.3, 0.2, 0.06, True), (0.22, 0.2, 0.001, True), (1.0, 1.0, 0.0, True)],
)
def test_near_chance_takes_a_gain_that_is_large_and_sure(
    recall: float, chance: float, error: float, near: bool
) -> None:
    assert Alignment(recall, chance, error, 100, "here").near_chance is near


def test_a_sample_without_terms_is_refused() -> None:
    found = reader()
    with pytest.raises(DataError, match="here: 1 texts with a term"):
        measure(found, collect(found.model, ["", "a", ""], "passage", None, None), "here")
