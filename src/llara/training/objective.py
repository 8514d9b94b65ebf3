"""The adaptation objective on a batch: both branches in one pass over a shared text, or one pass per branch.

Shapes: B texts, W padded width, K slots, D hidden size, V vocabulary, M targets, L tokens of a language-model term.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llara.losses.adapt import language_model_loss, set_recall, slot_logits, token_set_loss
from llara.masks import Layout, MaskForm, branch_layout, packed_layout, prepared_mask
from llara.model import EmbeddingModel
from llara.templates import BoundSide
from llara.training.sharding import is_sharded
from llara.training.trainer import Batch, TrainModule

Objective = Literal["ebae+ebar", "ebae", "ebar", "lm"]
NAMES = ("ebae", "ebar", "lm")
BRANCHES = ("self", "next")
Ids = npt.NDArray[np.int64]


class Prompts(NamedTuple):
    """The two branches of a template in token ids, the id that fills rows up, and ids that are no targets."""

    self_side: BoundSide
    next_side: BoundSide
    pad_id: int
    special_ids: tuple[int, ...] = ()


class Plan(NamedTuple):
    """How an objective runs.

    objective: which branches are trained. one_pass: whether both share a row, where both are. form: how the model takes
    the mask of such rows. packed: whether such a row holds several texts.
    """

    objective: Objective
    one_pass: bool
    loss_scale: float
    lm_weight: float
    unique_targets: bool = True
    form: MaskForm = MaskForm()
    packed: bool = False

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that are trained."""
        return {"ebae+ebar": ("self", "next"), "ebae": ("self",), "ebar": ("next",), "lm": ()}[self.objective]

    @property
    def shared(self) -> bool:
        """Whether both branches share one row."""
        return self.one_pass and len(self.branches) == 2

    @property
    def packs(self) -> bool:
        """Whether several texts share one row, each with both branches."""
        return self.packed and self.shared


def collate(
    texts: Sequence[Ids],
    next_texts: Sequence[Ids],
    prompts: Prompts,
    plan: Plan,
    token_weights: npt.NDArray[np.float32] | None = None,
) -> Batch:
    """Builds one forward pass, padded on the right; all that depends on the data's shape is settled here, on the CPU.

    Positions are flat: position p of row r stands at `r * W + p`. There is a row per text, or one for all of them where
    the plan packs them.

    Args:
        texts: Token ids per text, B of them.
        next_texts: Token ids of the texts after them; an empty one means that there is none.
        prompts: The template.
        plan: The objective.
        token_weights: float32 [V], what each token of the vocabulary weighs as a target; None: all weigh the same.

    Returns:
        The token ids: `shared` int64 [B, W], or `self`, `next`, `text` where they run alone; `text_lengths` int64 [B]
        (prefix included), and of a packed row its `Layout`; `counts` int64 [3]; `tokens` and `cells`, ints, without and
        with padding.
        Per branch `<b>_slots` int64 [B, K], flat positions in the branch's rows, and its targets as in `targets_of`:
        `<b>_rows`, `<b>_ids` int64 [M], `<b>_weights` float32 [M].
        With a language-model term `lm_slots`, `lm_ids` int64 [L]: flat positions in the first rows named above, and
        the token after each.
    """
    prefix = np.asarray(prompts.self_side.prefix, dtype=np.int64)
    starts = [np.concatenate([prefix, text]) for text in texts]
    lengths = np.array([len(start) for start in starts], dtype=np.int64)
    suffixes = {
        "self": np.asarray(prompts.self_side.suffix, dtype=np.int64),
        "next": np.asarray(prompts.next_side.suffix, dtype=np.int64),
        "text": np.empty(0, dtype=np.int64),
    }
    suffixes["shared"] = np.concatenate([suffixes["self"], suffixes["next"]])
    kinds = ("shared",) if plan.shared else plan.branches or ("text",)
    counts = torch.zeros(3, dtype=torch.int64)
    batch: Batch = {"text_lengths": torch.from_numpy(lengths), "counts": counts, "tokens": 0, "cells": 0}
    if plan.packs:
        layout = packed_layout(lengths.tolist(), len(suffixes["self"]), len(suffixes["next"]))
        batch |= layout._asdict()
    begins: dict[str, Ids] = {}  # where each text begins, flat
    for kind in kinds:
        rows = [np.concatenate([start, suffixes[kind]]) for start in starts]
        sizes = lengths + len(suffixes[kind])
        if plan.packs:
            batch[kind] = _pad([np.concatenate(rows)], prompts.pad_id, layout.documents.shape[1])
            begins[kind] = np.cumsum(sizes) - sizes
        else:
            batch[kind] = _pad(rows, prompts.pad_id, int(sizes.max()))
            begins[kind] = np.arange(len(rows)) * batch[kind].shape[1]
        batch["tokens"] += int(sizes.sum())
        batch["cells"] += batch[kind].numel()
    for number, (branch, wanted) in enumerate((("self", texts), ("next", next_texts))):
        if branch not in plan.branches:
            continue
        kind = "shared" if plan.shared else branch
        ends = begins[kind] + lengths + (len(suffixes[kind]) if branch == "next" else len(suffixes["self"]))
        slots = (prompts.self_side if branch == "self" else prompts.next_side).slots
        batch[f"{branch}_slots"] = torch.from_numpy(ends[:, None] - slots + np.arange(slots))
        owners, ids, weights = targets_of(wanted, prompts.special_ids, token_weights, unique=plan.unique_targets)
        batch |= {f"{branch}_rows": owners, f"{branch}_ids": ids, f"{branch}_weights": weights}
        counts[number] = len(np.unique(owners.numpy()))
    if plan.objective == "lm" or plan.lm_weight:
        # Without a prefix the first token has nothing before it and is left out.
        first, kind = max(len(prefix), 1), kinds[0]
        spans = [np.arange(begin + first, begin + length) for begin, length in zip(begins[kind], lengths, strict=True)]
        predicted = torch.from_numpy(np.concatenate(spans))
        batch["lm_slots"], batch["lm_ids"] = predicted - 1, batch[kind].flatten()[predicted]
        counts[2] = len(predicted)
    return batch


def targets_of(
    targets: Sequence[Ids],
    special_ids: Sequence[int] = (),
    token_weights: npt.NDArray[np.float32] | None = None,
    *,
    unique: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the targets of all texts as flat lists: which text, which token (int64 [M]), its weight (float32 [M]).

    Each token stands once per text. The weights of one text sum to 1; a text of which no token weighs anything has no
    target at all. Without `unique` a token weighs as often as it occurs.
    """
    rows = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
    ids = np.concatenate([*targets, np.empty(0, dtype=np.int64)]).astype(np.int64)
    base = int(ids.max(initial=0)) + 1
    keys, repeats = np.unique(rows * base + ids, return_counts=True)
    rows, ids = keys // base, keys % base
    weights = np.ones(len(ids)) if token_weights is None else token_weights[ids].astype(np.float64)
    if not unique:
        weights = weights * repeats
    kept = (weights > 0) & ~np.isin(ids, special_ids)
    rows, ids, weights = rows[kept], ids[kept], weights[kept]
    weights /= np.bincount(rows, weights, minlength=len(targets))[rows]
    return torch.from_numpy(rows), torch.from_numpy(ids), torch.from_numpy(weights.astype(np.float32))


def _pad(rows: Sequence[Ids], pad_id: int, width: int) -> Tensor:
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
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
        for branch, logits in zip(plan.branches, self._logits(batch, states), strict=True):
            number = BRANCHES.index(branch)
            total = token_set_loss(logits, *self._targets(batch, branch))
            sums[number] = total.detach()
            loss = loss + plan.loss_scale * total / counts[number].clamp(min=1).float() / active
        if plan.objective == "lm" or plan.lm_weight:
            weight = 1.0 if plan.objective == "lm" else plan.lm_weight
            hidden = next(iter(states.values())).flatten(0, 1).index_select(0, batch["lm_slots"])
            sharded = is_sharded(model.lm)
            matrix = None if sharded else model.head_matrix
            scale = weight / counts[2].clamp(min=1).float()
            part = language_model_loss(
                hidden, batch["lm_ids"], model.head, scale=scale, weight=matrix, recompute=sharded
            )
            sums[2] = part.detach() / scale
            loss = loss + part
        return loss, sums

    @torch.no_grad()
    def recall(self, batch: Batch) -> Tensor:
        """Returns how well the slots name their targets, float32 [2, 2]: per branch a sum over texts, and their number.

        A text's recall is the share of its target set, of n tokens, among the n tokens that its slots find likeliest.
        A branch that the plan does not train stays zero.
        """
        states = self.branch_states(batch)
        found = torch.zeros(2, 2, device=batch["text_lengths"].device)
        for branch, logits in zip(self.plan.branches, self._logits(batch, states), strict=True):
            rows, ids, _ = self._targets(batch, branch)
            found[BRANCHES.index(branch)] = set_recall(logits, rows, ids)
        return found

    def branch_states(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the hidden states [B, W, D] per branch, or of `text`; in one pass both branches have the same."""
        model = self._model[0]
        if not self.plan.shared:
            kinds = self.plan.branches or ("text",)
            return {kind: model.trunk(input_ids=batch[kind], attention_mask=None) for kind in kinds}
        if self.plan.packs:
            layout = Layout(*(batch[name] for name in Layout._fields))
        else:
            sizes = (len(self.prompts.self_side.suffix), len(self.prompts.next_side.suffix))
            layout = branch_layout(batch["text_lengths"], *sizes, batch["shared"].shape[1]).layout
        mask = prepared_mask(layout, self.plan.form, model.window, self.lm.dtype)
        states = model.trunk(input_ids=batch["shared"], attention_mask=mask, position_ids=layout.position_ids)
        return {"self": states, "next": states}

    def slots(self, batch: Batch, states: dict[str, Tensor], branch: str) -> Tensor:
        """Returns a branch's hidden states at its slots, [B, K, D]."""
        slots = batch[f"{branch}_slots"]
        return states[branch].flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, -1)

    def _logits(self, batch: Batch, states: dict[str, Tensor]) -> list[Tensor]:
        slots = [self.slots(batch, states, branch) for branch in self.plan.branches]
        return slot_logits(slots, self._model[0].head)

    def _targets(self, batch: Batch, branch: str) -> tuple[Tensor, Tensor, Tensor]:
        return batch[f"{branch}_rows"], batch[f"{branch}_ids"], batch[f"{branch}_weights"]
