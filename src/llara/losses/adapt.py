"""EBAE and EBAR (Llama2Vec, section 3.1), and the plain language-model loss that they are compared with.

Shapes: B texts, K slots, D hidden size, V vocabulary, M targets over all texts.
Every function returns a *sum* over its examples: the caller divides by the count over all ranks and accumulation steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]


def slot_logits(slot_states: Tensor, head: Head) -> Tensor:
    """Returns what the slots together say of the vocabulary, float32 [B, V].

    Several slots are joined by the element-wise maximum of their logits before the softmax, as the released LLARA
    code does; with one slot, as in the paper, this is the LM head itself.

    Args:
        slot_states: [B, K, D], hidden states at the slots.
        head: The model's LM head with its own scaling or soft-cap, [..., D] to [..., V].
    """
    logits = head(slot_states).float()
    return logits.squeeze(1) if logits.shape[1] == 1 else logits.amax(dim=1)


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


def language_model_loss(states: Tensor, labels: Tensor, head: Head, chunk: int = 1024) -> Tensor:
    """Returns the summed cross-entropy of next tokens, a float32 scalar, without ever holding all logits.

    Args:
        states: [M, D], hidden states that each predict one token.
        labels: int64 [M], the tokens to predict.
        head: The LM head, see `slot_logits`.
        chunk: Rows of logits held at a time; they are computed again in the backward pass.
    """

    def chunk_loss(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(part).float(), wanted, reduction="sum")

    total = states.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(torch.split(states, chunk), torch.split(labels, chunk), strict=True):
        loss = checkpoint(chunk_loss, part, wanted, use_reentrant=False) if states.requires_grad else None
        total = total + (chunk_loss(part, wanted) if loss is None else loss)
    return total
