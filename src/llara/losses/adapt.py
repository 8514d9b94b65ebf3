"""EBAE and EBAR (Llama2Vec, section 3.1), and the plain language-model loss that they are compared with.

Shapes: B texts, K slots, D hidden size, V vocabulary, M targets over all texts.
Every function returns a *sum* over its examples: the caller divides by the count over all ranks and accumulation steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from llara import onednn

Head = Callable[[Tensor], Tensor]
CHUNK = 512
"""Rows of logits at a time in a language-model loss: fewer make its products slower. 66 MB at 32,016 tokens."""


def slot_logits(slot_states: Sequence[Tensor], head: Head) -> list[Tensor]:
    """Returns what the slots of each branch together say of the vocabulary, float32 [B, V] each.

    Several slots are joined by the element-wise maximum of their logits before the softmax, as the released LLARA
    code does; with one slot, as in the paper, this is the LM head itself. The head runs once for all branches: its
    weight is large beside a few slots, and so is its gradient.

    Args:
        slot_states: [B, K, D] per branch, hidden states at the slots.
        head: The model's LM head with its own scaling or soft-cap, [..., D] to [..., V].
    """
    if not slot_states:
        return []
    logits = head(torch.cat([states.flatten(0, 1) for states in slot_states]))
    parts = torch.split(logits, [states.shape[0] * states.shape[1] for states in slot_states])
    joined = []
    for part, states in zip(parts, slot_states, strict=True):
        count = states.shape[1]
        joined.append(part.float() if count == 1 else part.view(-1, count, part.shape[1]).amax(dim=1).float())
    return joined


def token_set_loss(logits: Tensor, target_rows: Tensor, target_ids: Tensor, target_weights: Tensor) -> Tensor:
    """Returns the sum over texts of `-sum over its targets of weight x log_softmax(logits)_t`, a float32 scalar.

    The targets are ragged lists in flat tensors, so there is neither a loop over texts nor a padded target.
    A text without targets adds nothing.

    Args:
        logits: float32 [B, V].
        target_rows: int64 [M], the text that each target belongs to.
        target_ids: int64 [M], token ids.
        target_weights: float32 [M]; those of one text sum to 1.
    """
    weights = target_weights.to(logits.dtype)
    per_text = logits.new_zeros(logits.shape[0]).index_add(0, target_rows, weights)
    normaliser = (torch.logsumexp(logits, dim=-1) * per_text).sum()
    return normaliser - (logits[target_rows, target_ids] * weights).sum()


def set_recall(logits: Tensor, target_rows: Tensor, target_ids: Tensor) -> Tensor:
    """Returns the summed recall of the texts that have a target, and how many they are, float32 [2].

    Recall is the share of a text's n targets among the n largest logits; among equal logits the order is undefined.

    Args:
        logits: [B, V].
        target_rows: int64 [M], the text that each target belongs to.
        target_ids: int64 [M], token ids, each once per text.
    """
    size = torch.bincount(target_rows, minlength=logits.shape[0])
    if not len(target_rows):
        return logits.new_zeros(2)
    likeliest = logits.topk(int(size.max()), dim=-1).indices
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    wanted[target_rows, target_ids] = True
    rank = torch.arange(likeliest.shape[1], device=logits.device)
    hits = (wanted.gather(1, likeliest) & (rank < size[:, None])).sum(dim=1)
    has_target = size > 0
    return torch.stack([(hits / size.clamp(min=1)).sum(), has_target.sum()]).float()


def language_model_loss(
    states: Tensor,
    labels: Tensor,
    head: Head,
    chunk: int = CHUNK,
    *,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Returns `scale` x summed cross-entropy of next tokens, of float32 or more, without ever holding all logits.

    The gradient is computed in the forward pass, chunk by chunk, while a chunk's logits are there: computing them again
    in the backward pass would cost a fourth product with the head's weight beside the three that are needed.

    Args:
        states: [M, D], hidden states that each predict one token.
        labels: int64 [M], the tokens to predict.
        head: The LM head, see `slot_logits`.
        chunk: Rows of logits held at a time.
        scale: A scalar without gradient; None stands for 1. Handed in, it costs no pass over the head's gradient.
        weight: [V, D] where the head is a product with this and nothing else; its gradient is then added up in place.
        recompute: Compute logits again in the backward pass instead: for weights that are only there while a module
            runs, as under FSDP2.
    """
    scale = states.new_ones(()) if scale is None else scale
    if torch.is_grad_enabled() and recompute:
        parts = zip(torch.split(states, chunk), torch.split(labels, chunk), strict=True)
        losses = [checkpoint(_cross_entropy, part, wanted, head, use_reentrant=False) for part, wanted in parts]
        return torch.stack(losses).sum() * scale
    total: Tensor
    if weight is not None and weight.dtype == states.dtype and not _autocasts(states.device):
        total = _LinearCrossEntropy.apply(states, weight, labels, scale, chunk)  # type: ignore[no-untyped-call]
        return total
    weights = trained_leaves(head(states[:1].detach())) if torch.is_grad_enabled() else []
    total = _HeadCrossEntropy.apply(states, labels, head, chunk, *weights)  # type: ignore[no-untyped-call]
    return total * scale


def trained_leaves(output: Tensor) -> list[Tensor]:
    """Returns the tensors that a result has gradients for: whatever trained weights were read to compute it."""
    leaves: dict[int, Tensor] = {}
    nodes: list[Any] = [output.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        nodes.extend(following for following, _ in node.next_functions)
    return list(leaves.values())


def _autocasts(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _cross_entropy(states: Tensor, labels: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(_at_least_float32(head(states)), labels, reduction="sum")


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _HeadCrossEntropy(torch.autograd.Function):
    """Through any head: what `trained_leaves` finds in it is handed in, and gets its gradient through autograd."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, head: Head, chunk: int, *weights: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        gradients = [torch.zeros_like(each) for each in (states, *weights)] if wanted else []
        for start in range(0, len(states), chunk):
            part = states[start : start + chunk].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = _cross_entropy(part, labels[start : start + chunk], head)
            total += loss.detach()
            if wanted:
                found = torch.autograd.grad(loss, [part, *weights])
                targets = (gradients[0][start : start + chunk], *gradients[1:])
                for gradient, each in zip(targets, found, strict=True):
                    gradient += each
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        states, *weights = (gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return states, None, None, None, *weights


class _LinearCrossEntropy(torch.autograd.Function):
    """Through a bare matrix: logits become probabilities and then gradients in one buffer.

    On a CPU this takes nine tenths of what `_HeadCrossEntropy` does (1,024 states of 288 under 32,016 tokens): no
    gradient as large as the head is made and added for each chunk, and none is multiplied by a scale that is known
    beforehand.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, chunk: int) -> Tensor:
        for_states, for_weight = ctx.needs_input_grad[:2]
        total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        state_gradient = torch.empty_like(states) if for_states else None
        weight_gradient = _empty_or_zero(weight, len(states)) if for_weight else None
        through_onednn = onednn.multiplies(states, weight)
        # oneDNN makes its own room for a product, which is free again after each chunk.
        buffer = states.new_empty(0 if through_onednn else min(chunk, len(states)), len(weight))
        for start in range(0, len(states), chunk):
            part, wanted = states[start : start + chunk], labels[start : start + chunk, None]
            if through_onednn:
                logits = onednn.product(part, weight)
            else:
                logits = _at_least_float32(torch.mm(part, weight.T, out=buffer[: len(part)]))
            picked, (largest, likeliest) = logits.gather(1, wanted), logits.max(dim=1, keepdim=True)
            probabilities = torch.softmax(logits, dim=1, out=logits)
            # log-sum-exp = largest logit - log of its probability, which is at least 1 / V and never rounds to 0.
            total += (largest - probabilities.gather(1, likeliest).log() - picked).sum()
            # The gradient of the logits: their softmax, less one at the token that follows.
            gradient = probabilities.scatter_add_(1, wanted, -torch.ones_like(picked)).to(states.dtype)
            if state_gradient is not None and through_onednn:
                state_gradient[start : start + chunk] = onednn.product(gradient, weight.T)
            elif state_gradient is not None:
                torch.mm(gradient, weight, out=state_gradient[start : start + chunk])
            if weight_gradient is not None:
                # The scale meets the narrow factor of the product.
                weight_gradient.addmm_(gradient.T, part * scale.to(part.dtype), beta=float(start > 0))
            del logits, probabilities, gradient
        if state_gradient is not None:
            state_gradient *= scale.to(state_gradient.dtype)
        ctx.save_for_backward(state_gradient, weight_gradient)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        # On a CPU it costs nothing to see that a loss is not scaled further; a GPU would have to be waited for.
        if outer.device.type == "cpu" and outer.numpy() == 1:
            return *ctx.saved_tensors, None, None, None
        scaled = [None if each is None else each * outer.to(each.dtype) for each in ctx.saved_tensors]
        return *scaled, None, None, None


def _empty_or_zero(weight: Tensor, rows: int) -> Tensor:
    """Returns room for the first chunk's product to be written to, and zeros where there is none."""
    return torch.empty_like(weight) if rows else torch.zeros_like(weight)
