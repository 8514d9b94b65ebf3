"""Rows of new tokens, trained while the rest of the embeddings and of the LM head stays frozen.

The rows live beside the table and take the place of its own where they are read, so that the table is neither copied
nor given a gradient, however large the vocabulary. At the end they are written into it.

Shapes: K new tokens, V vocabulary, D size of a row, [...] any shape.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llara.errors import ModelError


class TrainedRows(nn.Module):
    """A frozen table of which some rows are trained.

    Attributes:
        table: The embeddings or the LM head, as the model has them (LoRA layers included).
        ids: int64 [K], the tokens whose rows are trained.
        rows: float32 [K, D], in the place of `table.weight[ids]`; tied tables share them.
    """

    ids: Tensor

    def __init__(self, table: nn.Module, ids: Sequence[int], rows: nn.Parameter | None = None) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("ids", torch.tensor(list(ids), device=self.weight.device), persistent=False)
        # In float32, as PEFT keeps its own weights: small updates vanish in bfloat16.
        self.rows = nn.Parameter(self.weight[self.ids].detach().float().clone()) if rows is None else rows

    @property
    def weight(self) -> Tensor:
        """The frozen table's own weight [V, D], whose rows of new tokens are out of date."""
        weight: Tensor = self.table.weight  # type: ignore[assignment]
        return weight


class TrainedEmbeddings(TrainedRows):
    """Input embeddings of which some rows are trained."""

    def forward(self, token_ids: Tensor) -> Tensor:
        """Returns the embeddings of token ids int64 [...], [..., D]."""
        states: Tensor = self.table(token_ids)
        found = token_ids[..., None] == self.ids
        # Rounded as they will be in the table, and scaled as Gemma scales what it reads.
        own = F.embedding(found.int().argmax(dim=-1), self.rows.to(self.weight.dtype))
        scale = torch.as_tensor(getattr(self.table, "embed_scale", 1.0), device=own.device)
        return torch.where(found.any(dim=-1, keepdim=True), (own * scale.to(own.dtype)).to(states.dtype), states)


class TrainedHead(TrainedRows):
    """An LM head of which some rows are trained."""

    def forward(self, states: Tensor) -> Tensor:
        """Returns the logits [..., V] of hidden states [..., D]."""
        logits: Tensor = self.table(states)
        bias = getattr(self.table, "bias", None)
        own = F.linear(states, self.rows.to(states.dtype), None if bias is None else bias[self.ids])
        return logits.index_copy_(-1, self.ids, own.to(logits.dtype))


def train_rows(lm: Any, ids: Sequence[int]) -> None:
    """Makes the rows of `ids` trainable in the embeddings and in the LM head, in place; what is tied stays tied.

    Raises:
        ModelError: The model's embeddings do more with a row than look it up and scale it.
    """
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    read = TrainedEmbeddings(embeddings, ids)
    with torch.no_grad():
        if not torch.equal(read(read.ids), embeddings(read.ids)):
            kind = type(embeddings).__name__
            raise ModelError(f"the rows of new tokens cannot be trained alone in a {kind}; train without LoRA")
    _replace(lm, embeddings, read)
    if head is not None:
        tied = head.weight is embeddings.weight
        _replace(lm, head, TrainedHead(head, ids, read.rows if tied else None))


@torch.no_grad()
def fix_rows(lm: Any) -> None:
    """Writes trained rows into their tables and puts these back into the model, in place."""
    for wrapped in list(_trained(lm)):
        wrapped.weight[wrapped.ids] = wrapped.rows.to(wrapped.weight.dtype)
        _replace(lm, wrapped, wrapped.table)


def _trained(lm: Any) -> Iterator[TrainedRows]:
    return (module for module in lm.modules() if isinstance(module, TrainedRows))


def _replace(lm: Any, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever a part of the model is called `old`."""
    places = [(parent, name) for parent in lm.modules() for name, part in parent.named_children() if part is old]
    for parent, name in places:
        setattr(parent, name, new)
