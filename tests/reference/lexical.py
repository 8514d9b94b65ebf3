"""The slow, obvious twin of `lexical.py`: one text at a time, with the logits of all its positions."""

import math

import torch

from llara.model import EmbeddingModel
from llara.templates import SideName


def text_terms(
    model: EmbeddingModel, text: str, side: SideName, *, top_k: int, expansion: bool, fold: bool, length: int
) -> list[tuple[int, float]]:
    """Returns a text's terms as token id and weight, the largest weight first."""
    bound, words = model.bind().side(side), model.tokenizer
    row = model.bind().encode([text], side, length)[0]
    logits = model.lm(input_ids=torch.tensor([row]), use_cache=False).logits[0, len(row) - bound.slots :]
    joined = logits.max(dim=0).values.tolist()
    variants: dict[str, int] = {}
    best: dict[int, float] = {}
    stands_for = {}
    for token in range(len(words)):
        if token in words.all_special_ids or token in row[len(row) - bound.slots :]:
            continue
        bare = words.decode([token]).strip().lower()
        plain = bare and "\N{REPLACEMENT CHARACTER}" not in bare
        stands_for[token] = variants.setdefault(bare, token) if fold and plain else token
        best[stands_for[token]] = max(best.get(stands_for[token], -math.inf), joined[token])
    own = {stands_for[token] for token in row[len(bound.prefix) : len(row) - len(bound.suffix)] if token in stands_for}
    weights = {token: math.log(1 + logit) for token, logit in best.items() if logit > 0}
    allowed = weights if expansion else {token: weight for token, weight in weights.items() if token in own}
    return sorted(allowed.items(), key=lambda each: (-each[1], each[0]))[:top_k]
