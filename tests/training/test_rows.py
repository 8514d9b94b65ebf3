"""Rows of new tokens: read, trained and written as if the whole table were trained and the rest of it put back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llara.errors import ModelError
from llara.training.rows import TrainedEmbeddings, TrainedHead, fix_rows, train_rows
from tests import tiny
from tests.reference.rows import read_with_rows

IDS = [7, 3, 399]
TOKENS = torch.tensor([[3, 5, 7, 7], [399, 0, 398, 3]])


def compare(found: Tensor, rows: Tensor, expected: Tensor, reference: Tensor) -> None:
    """Values, and the gradients on the rows of any further use of the values."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    onwards = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    gradients = (
        torch.autograd.grad((found * onwards).sum(), rows),
        torch.autograd.grad((expected * onwards).sum(), reference),
    )
    assert float(gradients[0][0].abs().min()) > 0
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-5, atol=1e-5)


def moved(rows: Tensor) -> Tensor:
    """Moves the rows away from where they began, and returns a copy to differentiate by."""
    with torch.no_grad():
        rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)))
    return rows.detach().clone().requires_grad_()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_embeddings_are_those_of_a_whole_table(family: str) -> None:
    table = tiny.language_model(family).requires_grad_(False).get_input_embeddings()
    before = table(TOKENS)
    read = TrainedEmbeddings(table, IDS)
    assert torch.equal(read(TOKENS), before)
    reference = moved(read.rows)
    compare(read(TOKENS), read.rows, read_with_rows(table, IDS, reference, TOKENS), reference)
    assert torch.equal(table(TOKENS), before), "the table itself is not touched"


@pytest.mark.parametrize("family", ["llama", "phi", "gptj"])
def test_logits_are_those_of_a_whole_table(family: str) -> None:
    table = tiny.language_model(family).requires_grad_(False).get_output_embeddings()
    states = torch.randn(2, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    head = TrainedHead(table, IDS)
    torch.testing.assert_close(head(states), table(states), rtol=1e-6, atol=1e-6)
    reference = moved(head.rows)
    compare(head(states), head.rows, read_with_rows(table, IDS, reference, states), reference)
    both = head(states), read_with_rows(table, IDS, reference, states)
    on_states = [torch.autograd.grad(logits.square().sum(), states)[0] for logits in both]
    torch.testing.assert_close(*on_states, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("opt", True), ("gptj", False)])
def test_rows_stay_tied_and_are_written_into_their_tables(family: str, tied: bool) -> None:
    lm = tiny.language_model(family, **({"tie_word_embeddings": tied} if family == "llama" else {})).requires_grad_(
        False
    )
    tables = lm.get_input_embeddings(), lm.get_output_embeddings()
    old = [table.weight.detach().clone() for table in tables]
    train_rows(lm, IDS)
    trained = [value for value in lm.parameters() if value.requires_grad]
    assert [tuple(value.shape) for value in trained] == [(3, tiny.HIDDEN)] * (1 if tied else 2)
    for value in trained:
        moved(value)
    logits = lm(input_ids=TOKENS).logits
    fix_rows(lm)
    assert (lm.get_input_embeddings(), lm.get_output_embeddings()) == tables
    torch.testing.assert_close(lm(input_ids=TOKENS).logits, logits, rtol=1e-5, atol=1e-5)
    others = [n for n in range(400) if n not in IDS]
    for table, before, value in zip(tables, old, (trained[0], trained[-1]), strict=True):
        assert torch.equal(table.weight[IDS], value)
        assert torch.equal(table.weight[others], before[others])


def test_rows_of_a_bfloat16_table_are_trained_in_float32_and_read_as_they_will_be_written() -> None:
    table = nn.Embedding(400, 8, dtype=torch.bfloat16).requires_grad_(False)
    read = TrainedEmbeddings(table, IDS)
    assert read.rows.dtype == torch.float32
    moved(read.rows)
    states = read(TOKENS)
    assert states.dtype == torch.bfloat16
    assert torch.equal(states[0, 0], read.rows[1].detach().bfloat16())


def test_embeddings_that_do_more_than_look_up_are_refused() -> None:
    class Odd(nn.Embedding):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input).tanh()

    lm = tiny.language_model()
    lm.set_input_embeddings(Odd(400, tiny.HIDDEN))
    with pytest.raises(ModelError, match="the rows of new tokens cannot be trained alone in a Odd; train without LoRA"):
        train_rows(lm, IDS)
