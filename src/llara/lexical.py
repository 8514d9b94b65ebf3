"""What an embedding says: the LM head turns the slot that a vector is read from into weights over the vocabulary.

EBAE and EBAR train that slot to name, through the head, the tokens of the text and of the one after it (Llama2Vec,
section 3). So one forward pass gives both a dense vector and a sparse one: the query side says NEXT, the passage side
SELF. A token's weight is `log(1 + max(0, logit))` (SPLADE; read off a language model's head in PromptReps, arXiv
2404.18424, section 3.2). Nothing in the loss holds the logits' own level, so a head that was never adapted may put
all of them below zero (GPT-2's does): such a text has no terms.

Shapes: n texts, B rows of one batch, K slots, D hidden size, V rows of the LM head, M terms of all texts.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llara.errors import ConfigError, ModelError
from llara.losses.adapt import slot_logits
from llara.model import EmbeddingModel, OnBatch
from llara.pooling import slot_states
from llara.templates import SideName
from llara.terms import Terms as Terms

Ids = npt.NDArray[np.int64]
Row = tuple[Ids, npt.NDArray[np.float32]]  # the token ids and weights of one text
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a token decodes to that holds a part of a character
# Logits at a time: 256 MB in float32. A GPU's batch of short queries has more rows than it has room for logits.
MOST_LOGITS = 2**26


@dataclass(frozen=True)
class TermOptions:
    """Which terms a text gets.

    Attributes:
        top_k: Terms per text at most: those of the largest weights.
        expansion: Whether a term may be one that does not stand in the text.
        fold: Whether the case and space variants of a word are one term; see `folded_ids`.
    """

    top_k: int = 128
    expansion: bool = True
    fold: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"top_k: must be 1 or more, got {self.top_k}")


class Tokens(NamedTuple):
    """Tokenised texts: the rows that the model reads, and of each the ids that are the text's own, prompt left out.

    `own` is empty where nobody asks for terms.
    """

    rows: Sequence[Sequence[int]]
    own: Sequence[Sequence[int]] = ()


class SlotBatch(NamedTuple):
    """One batch of texts after their forward pass.

    numbers: int64 [B], which texts they are. vectors: [B, D], the dense ones. slots: [B, K, D], hidden states. own: the
    token ids of each of the B texts as far as the model read it, prompt left out.
    """

    numbers: Ids
    vectors: Tensor
    slots: Tensor
    own: Sequence[Sequence[int]]


def tokenise(model: EmbeddingModel, texts: Sequence[str], side: SideName, max_length: int | None = None) -> Tokens:
    """Returns the texts' rows and their own token ids; see `EmbeddingModel.tokenise`."""
    template = model.bind()
    rows = model.tokenise(texts, side, max_length)
    return Tokens(rows, [template.unwrap(row, side) for row in rows])


def read_slots(
    model: EmbeddingModel,
    texts: Sequence[str],
    side: SideName,
    token_budget: int | None = None,
    max_length: int | None = None,
    on_batch: OnBatch | None = None,
) -> Iterator[SlotBatch]:
    """Runs texts through the model in evaluation mode, without gradients; see `TermReader.encode` for the arguments."""
    return read_rows(model, tokenise(model, texts, side, max_length), side, token_budget, on_batch)


@torch.inference_mode()  # which, on a generator, holds while it runs and not while its caller does
def read_rows(
    model: EmbeddingModel,
    tokens: Tokens,
    side: SideName,
    token_budget: int | None = None,
    on_batch: OnBatch | None = None,
) -> Iterator[SlotBatch]:
    """Does what `read_slots` does for texts that `tokenise` has prepared."""
    count = len(getattr(model.contract.template, side).slots)
    training = model.lm.training
    model.lm.eval()
    try:
        for part in model.passes(tokens.rows, count, token_budget, on_batch):
            vectors = model.pool(part.states, part.ends, part.counts)
            slots = slot_states(part.states, part.ends, count)
            yield SlotBatch(part.numbers, vectors, slots, [tokens.own[number] for number in part.numbers])
    finally:
        model.lm.train(training)


class TermReader:
    """Reads weighted terms off the forward pass that gives the vectors.

    ```python
    reader = TermReader(load_model(config), TermOptions(top_k=64))
    vectors, terms = reader.encode(["why is the sky blue"], "query")
    ids, weights = terms.of(0)
    ```

    Making one decodes the whole vocabulary where `fold` is set, so make one and use it for every text.

    Attributes:
        model: The model whose head speaks.
        options: Which terms a text gets.
        counted: bool [V], the tokens that can be a term: those of the tokenizer, special ones left out.
        folding: int64 [V], the token that stands for each; None without folding.

    Raises:
        ModelError: The model has no trained LM head.
    """

    def __init__(self, model: EmbeddingModel, options: TermOptions | None = None) -> None:
        if not model.has_head:
            raise ModelError(
                f"{model.name}: its folder held no LM head, so nothing says which tokens its vectors stand for; "
                "take a model that was made from a causal language model with its head"
            )
        self.model, self.options = model, options or TermOptions()
        bound = model.bind()
        size = int(model.lm.get_output_embeddings().weight.shape[0])
        slots = {token for each in (bound.query, bound.passage) for token in each.suffix[-each.slots :]}
        self.counted = counted_tokens(model.tokenizer, size, slots)
        self.folding = folded_ids(model.tokenizer, size) if self.options.fold else None
        self._removed: Tensor | None = None
        self._refused = torch.from_numpy(~self.counted).to(model.device)
        self._targets = None if self.folding is None else torch.from_numpy(self.folding).to(model.device)

    def encode(
        self,
        texts: Sequence[str],
        side: SideName,
        token_budget: int | None = None,
        max_length: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[Tensor, Terms]:
        """Returns vectors, float32 [n, D] on the CPU as `EmbeddingModel.encode` gives them, and terms, in one pass.

        Logits are there for one batch at a time, for a part of one where it is large, and never for all texts.

        Args:
            texts: Passages with their titles joined, or queries.
            side: query says NEXT, passage says SELF.
            token_budget: See `EmbeddingModel.embed`.
            max_length: Tokens of a text, prompt included; default: the contract's.
            on_batch: Called after each batch with its number of texts.

        Raises:
            ConfigError: `max_length` is more than the model has positions for, or leaves no room for text.
        """
        return self.encode_rows(tokenise(self.model, texts, side, max_length), side, token_budget, on_batch)

    def encode_rows(
        self, tokens: Tokens, side: SideName, token_budget: int | None = None, on_batch: OnBatch | None = None
    ) -> tuple[Tensor, Terms]:
        """Does what `encode` does for texts that `tokenise` has prepared."""
        count = len(tokens.rows)
        vectors = torch.empty(count, self.model.dim)
        rows: list[Row] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * count
        for part in read_rows(self.model, tokens, side, token_budget, on_batch):
            vectors[torch.from_numpy(part.numbers)] = part.vectors.float().cpu()
            for number, row in zip(part.numbers, self.terms(part.slots, part.own), strict=True):
                rows[number] = row
        return vectors, Terms.of_rows(rows)

    @torch.inference_mode()
    def logits(self, slots: Tensor) -> Tensor:
        """Returns what slots [B, K, D] say of the vocabulary, float32 [B, V]; -inf for what is no term of its own.

        Several slots are joined as in the adaptation loss, variants of a word by their largest logit.
        """
        if self._removed is not None:
            full = slots.float()  # in bfloat16 hardly a digit would be left where the direction holds most of the slots
            slots = (full - (full @ self._removed)[..., None] * self._removed).to(slots.dtype)
        joined = slot_logits([slots], self.model.head)[0].masked_fill(self._refused, -torch.inf)
        if self._targets is None:
            return joined
        return torch.full_like(joined, -torch.inf).scatter_reduce(1, self._targets.expand_as(joined), joined, "amax")

    def own_terms(self, own: Sequence[int]) -> list[int]:
        """Returns the terms that stand in a text of these token ids: each once, rising, folded where the reader is."""
        ids = np.array(own, dtype=np.int64)
        ids = ids[self.counted[ids]]
        found: list[int] = np.unique(ids if self.folding is None else self.folding[ids]).tolist()
        return found

    @torch.inference_mode()
    def terms(self, slots: Tensor, own: Sequence[Sequence[int]]) -> Iterator[Row]:
        """Yields token ids and weights per text.

        Args:
            slots: [B, K, D].
            own: B texts' own token ids.
        """
        for part in self.spans(slots):
            yield from self._largest(self.logits(slots[part]), own[part])

    def spans(self, slots: Tensor) -> Iterator[slice]:
        """Yields which of the B rows of slots [B, K, D] there is room for the logits of, one part after the other."""
        rows = max(MOST_LOGITS // (slots.shape[1] * len(self.counted)), 1)
        yield from (slice(start, start + rows) for start in range(0, len(slots), rows))

    def without(self, direction: Tensor) -> "TermReader":
        """Returns a reader for which a direction, [D] of unit length, is taken out of the slots before the head."""
        other = copy.copy(self)
        other._removed = direction.float().to(self.model.device)
        return other

    def _largest(self, logits: Tensor, own: Sequence[Sequence[int]]) -> Iterator[Row]:
        if self.options.expansion:
            values, ids = logits.topk(min(self.options.top_k, logits.shape[1]))
        else:
            choices = self._padded(own)
            offered = logits.gather(1, choices.clamp(min=0)).masked_fill(choices < 0, -torch.inf)
            values, order = offered.topk(min(self.options.top_k, offered.shape[1]))
            ids = choices.gather(1, order)
        weights = torch.log1p(torch.relu(values)).cpu().numpy()
        for found, weight in zip(ids.cpu().numpy(), weights, strict=True):
            kept = np.lexsort((found, -weight))
            kept = kept[weight[kept] > 0]
            yield found[kept], weight[kept]

    def _padded(self, own: Sequence[Sequence[int]]) -> Tensor:
        """Returns each text's own terms, int64 [B, most], -1 where there is none."""
        terms = [torch.tensor(self.own_terms(ids), dtype=torch.int64) for ids in own]
        padded = torch.nn.utils.rnn.pad_sequence(terms, batch_first=True, padding_value=-1)
        return padded.to(self.model.device)


def counted_tokens(tokenizer: Any, size: int, slots: set[int]) -> npt.NDArray[np.bool_]:
    """Returns which of `size` rows of an LM head are tokens of text, bool [size].

    Special tokens are not, nor slots, nor the rows beyond the tokenizer's own that fill a head up to a round number.
    """
    counted = np.arange(size) < len(tokenizer)
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *slots, *(token for token, entry in added.items() if entry.special)}
    counted[[token for token in special if token < size]] = False
    return counted


def folded_ids(tokenizer: Any, size: int) -> Ids:
    """Returns the token that stands for each one of `size`, int64 [size]: the first with the same bare, lower text.

    `read`, ` read` (`Ġread` of byte-level BPE, `▁read` of sentencepiece), `Read` and `READ` are then one term. A token
    of blanks alone, or that holds only a part of a character, stands for itself. So does each special token.
    """
    folded = np.arange(size, dtype=np.int64)
    special = set(tokenizer.all_special_ids)
    first: dict[str, int] = {}
    for number, text in enumerate(tokenizer.batch_decode([[number] for number in range(min(len(tokenizer), size))])):
        bare = text.strip().lower()
        if bare and REPLACEMENT not in bare and number not in special:
            folded[number] = first.setdefault(bare, number)
    return folded
