"""The adaptation objective on a batch: both branches in one pass over a shared text, or one pass per branch.

Shapes: B texts, W padded width, K slots, D hidden size, V vocabulary, M targets.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llara.losses.adapt import language_model_loss, slot_logits, token_set_loss
from llara.masks import branch_layout
from llara.model import EmbeddingModel, slot_states
from llara.templates import BoundSide
from llara.training.trainer import Batch, TrainModule

Objective = Literal["ebae+ebar", "ebae", "ebar", "lm"]
NAMES = ("ebae", "ebar", "lm")
Ids = npt.NDArray[np.int64]


class Prompts(NamedTuple):
    """The two branches of a template in token ids, the id that fills rows up, and ids that are no targets."""

    self_side: BoundSide
    next_side: BoundSide
    pad_id: int
    special_ids: tuple[int, ...] = ()


class Plan(NamedTuple):
    """How an objective runs: which branches, whether in one pass, and the language-model term's weight."""

    objective: Objective
    one_pass: bool
    loss_scale: float
    lm_weight: float
    unique_targets: bool = True

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that are trained."""
        return {"ebae+ebar": ("self", "next"), "ebae": ("self",), "ebar": ("next",), "lm": ()}[self.objective]

    @property
    def shared(self) -> bool:
        """Whether both branches share one row."""
        return self.one_pass and len(self.branches) == 2


def collate(texts: Sequence[Ids], next_texts: Sequence[Ids], prompts: Prompts, plan: Plan) -> Batch:
    """Builds one batch, padded on the right, with ragged targets as flat index lists.

    Args:
        texts: Token ids per text, B of them.
        next_texts: Token ids of the texts after them; an empty one means that there is none.
        prompts: The template.
        plan: The objective.

    Returns:
        `text_lengths` int64 [B] (prefix included), `prefix_length`, `counts` int64 [3], per branch `<b>_rows` and
        `<b>_ids` int64 [M], and the token ids: `shared` int64 [B, W], or `self`, `next`, `text` where they run alone.
    """
    prefix = np.asarray(prompts.self_side.prefix, dtype=np.int64)
    starts = [np.concatenate([prefix, text]) for text in texts]
    suffixes = {"self": prompts.self_side.suffix, "next": prompts.next_side.suffix}
    batch: Batch = {
        "text_lengths": torch.tensor([len(start) for start in starts]),
        "prefix_length": len(prefix),
        "counts": torch.zeros(3, dtype=torch.int64),
    }
    if plan.shared:
        both = np.asarray([*suffixes["self"], *suffixes["next"]], dtype=np.int64)
        batch["shared"] = _pad([np.concatenate([start, both]) for start in starts], prompts.pad_id)
    else:
        for branch in plan.branches:
            suffix = np.asarray(suffixes[branch], dtype=np.int64)
            batch[branch] = _pad([np.concatenate([start, suffix]) for start in starts], prompts.pad_id)
    if not plan.branches:
        batch["text"] = _pad(starts, prompts.pad_id)
    for number, (branch, targets) in enumerate((("self", texts), ("next", next_texts))):
        if branch in plan.branches:
            wanted = [target[~np.isin(target, prompts.special_ids)] for target in targets]
            batch[f"{branch}_rows"], batch[f"{branch}_ids"] = ragged(wanted, unique=plan.unique_targets)
            batch["counts"][number] = sum(1 for target in wanted if len(target))
    if plan.objective == "lm" or plan.lm_weight:
        batch["counts"][2] = int(batch["text_lengths"].sum()) - len(starts) * max(len(prefix), 1)
    return batch


def ragged(targets: Sequence[Ids], *, unique: bool) -> tuple[Tensor, Tensor]:
    """Returns the targets of all texts as two flat lists, int64 [M]: which text, which token."""
    sets = [np.unique(target) if unique else target for target in targets]
    rows = np.repeat(np.arange(len(sets)), [len(target) for target in sets])
    return torch.from_numpy(rows), torch.from_numpy(np.concatenate(sets).astype(np.int64))


def _pad(rows: Sequence[Ids], pad_id: int) -> Tensor:
    ids = np.full((len(rows), max(len(row) for row in rows)), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return torch.from_numpy(ids)


class AdaptModule(TrainModule):
    """EBAE, EBAR and language modelling on one model, with logits only where they are read."""

    def __init__(self, model: EmbeddingModel, prompts: Prompts, plan: Plan) -> None:
        super().__init__()
        self.lm = model.lm
        self._model = [model]  # in a list, so that it is no submodule: its weights are already here as `lm`
        self.prompts, self.plan = prompts, plan

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """See `TrainModule.forward`. `counts` are those of the whole optimizer step: ebae texts, ebar texts, tokens.

        Loss = `loss_scale` x mean over the branches with targets of (sum / count)
        + `lm_weight` x mean over the text's tokens.
        """
        model, plan = self._model[0], self.plan
        states = self.branch_states(batch)
        sums = torch.zeros(3, dtype=torch.float32, device=counts.device)
        loss = torch.zeros((), device=counts.device)
        # A step in which no text has a next one is EBAE alone, not half of it.
        active = (counts[:2] > 0).sum().clamp(min=1).float()
        for branch in plan.branches:
            number = ("self", "next").index(branch)
            logits = slot_logits(self.slots(batch, states, branch), model.head)
            total = token_set_loss(logits, batch[f"{branch}_rows"], batch[f"{branch}_ids"])
            sums[number] = total.detach()
            loss = loss + plan.loss_scale * total / counts[number].clamp(min=1).float() / active
        if plan.objective == "lm" or plan.lm_weight:
            weight = 1.0 if plan.objective == "lm" else plan.lm_weight
            total = self._language_model(batch, states)
            sums[2] = total.detach()
            loss = loss + weight * total / counts[2].clamp(min=1).float()
        return loss, sums

    def branch_states(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns per branch (or `text`) the hidden states [B, W, D] and where the branch ends, int64 [B]."""
        model, lengths = self._model[0], batch["text_lengths"]
        if not self.plan.shared:
            sizes = {"self": len(self.prompts.self_side.suffix), "next": len(self.prompts.next_side.suffix), "text": 0}
            kinds = self.plan.branches or ("text",)
            return {
                kind: (model.trunk(input_ids=batch[kind], attention_mask=None), lengths + sizes[kind]) for kind in kinds
            }
        layout = branch_layout(
            lengths, len(self.prompts.self_side.suffix), len(self.prompts.next_side.suffix), batch["shared"].shape[1]
        )
        states = model.trunk(input_ids=batch["shared"], attention_mask=layout.mask, position_ids=layout.position_ids)
        return {"self": (states, layout.self_end), "next": (states, layout.next_end)}

    def slots(self, batch: Batch, states: dict[str, tuple[Tensor, Tensor]], branch: str) -> Tensor:
        """Returns a branch's hidden states at its slots, [B, K, D]."""
        side = self.prompts.self_side if branch == "self" else self.prompts.next_side
        return slot_states(*states[branch], side.slots)

    def _language_model(self, batch: Batch, states: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Returns the summed cross-entropy of the text's tokens, each predicted from what stands before it.

        Without a prefix the first token has nothing before it and is left out.
        """
        kind = next(iter(states))
        hidden = states[kind][0]
        ids = batch["shared"] if self.plan.shared else batch[kind]
        first = max(int(batch["prefix_length"]), 1)
        column = torch.arange(ids.shape[1] - 1, device=ids.device)
        wanted = (column >= first - 1) & (column < batch["text_lengths"][:, None] - 1)
        return language_model_loss(hidden[:, :-1][wanted], ids[:, 1:][wanted], self._model[0].head)
