"""Any Hugging Face decoder, or encoder, as an embedding model: embed, save, probe.

Shapes: B rows of one batch, W their padded width, K slots, D hidden size, n rows in all.

Rows are always padded on the right: under causal attention no real token can then see padding, so that neither mask
nor position ids are needed, and sliding windows and ALiBi work as the model's own code defines them. An encoder is told
by a mask which tokens are real; its position ids, too, are then those of the row alone.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llara import contract as contracts
from llara.batching import Indices, budget_batches
from llara.contract import Contract
from llara.errors import ConfigError, ModelError
from llara.pooling import POOLS, real_tokens
from llara.publishing import publish_model
from llara.templates import BoundTemplate, SideName, missing_tokens

OnBatch = Callable[[int], None]
Runner = Callable[[Tensor, Tensor], Tensor]
PROJECTION = "projection"  # what the part of an encoder is called that stands between pooling and vector
SIDES: tuple[SideName, ...] = ("query", "passage")

PROBE_TEXTS = (
    "The sky is blue because air scatters short wavelengths of light more than long ones.",
    "为什么天空是蓝色的, 하늘은 왜 파란가요?",
    "def read_lines(path):\n    return open(path).read().splitlines()  # </s>",
)
# A batch that fits the caches is half as fast again on a CPU; a GPU wants to be filled.
TOKEN_BUDGET = {"cpu": 1024}
# Largest difference of a unit vector's component between machines, thread counts and batch shapes, by the type that a
# model runs in; of int8 also to the vectors of the float weights that were rounded.
DTYPE_TOLERANCE = {"float32": 2e-4, "float64": 2e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 5e-2}
TOLERANCE = {getattr(torch, name): allowed for name, allowed in DTYPE_TOLERANCE.items()}


class Pass(NamedTuple):
    """One batch's way through the model.

    numbers: int64 [B], which rows they are. states: [B, W, D]. ends: int64 [B], one past the last slot. counts: slots
    per row, B of them.
    """

    numbers: Indices
    states: Tensor
    ends: Tensor
    counts: list[int]


class EmbeddingModel:
    """A causal language model, or an encoder, with its tokenizer and contract.

    Attributes:
        lm: The transformers model, a decoder's with its LM head; LoRA layers may be injected into it.
        tokenizer: Its tokenizer.
        contract: How text becomes a vector.
        name: What the user called the model.
        has_head: Whether the folder held an LM head; adaptation needs one.
        new_tokens: Ids of slot tokens that were added at load, whose embeddings are still to be trained.
        dtype: Name of the type that it runs in, that of its weights unless `use_backend` says otherwise.
        runner: What gives `states` instead of torch, None where torch does; see `llara.backends`.
    """

    def __init__(
        self, lm: Any, tokenizer: Any, contract: Contract, fingerprint: str | Callable[[], str], name: str
    ) -> None:
        self.lm, self.tokenizer, self.contract = lm, tokenizer, contract
        self._fingerprint, self.name = fingerprint, name
        self.has_head = True
        self._bound: tuple[tuple[Any, ...], BoundTemplate] | None = None
        self.new_tokens: list[int] = []
        self.runner: Runner | None = None
        self.dtype = str(next(lm.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that stands for weights, tokenizer and contract as they were loaded.

        Of a base model it is computed when first asked for: that reads all its weights once more.
        """
        return self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = next(self.lm.parameters()).device
        return device

    @property
    def dim(self) -> int:
        """D, the size of a vector: what the LM head takes, which some models project their states down to, or what an
        encoder's own projection gives.
        """
        if self.projection is not None:
            return int(self.projection.out_features)
        head = self.lm.get_output_embeddings()
        return int(self.lm.config.get_text_config().hidden_size if head is None else head.weight.shape[-1])

    @property
    def projection(self) -> Any:
        """A linear map from the pooled state to the vector, None where there is none; some encoders (GTR) have one."""
        return getattr(self.lm, PROJECTION, None)

    @cached_property
    def positions(self) -> int | None:
        """The longest row that the model has positions for, None where it names no limit."""
        return positions_of(self.lm)  # goes through all modules

    @property
    def window(self) -> int | None:
        """The sliding window of some or all of its layers, None where it names none."""
        window = getattr(self.lm.config.get_text_config(), "sliding_window", None)
        return window if isinstance(window, int) and window > 0 else None

    @property
    def pad_id(self) -> int:
        """The id that fills rows up; never seen by a real token."""
        return pad_id_of(self.tokenizer)

    def bind(self) -> BoundTemplate:
        """Returns the contract's template in this tokenizer's ids.

        It is remembered: looking for its tokens in a large vocabulary takes longer than a short query.
        """
        of = (self.contract.template, self.contract.bos, self.tokenizer, len(self.tokenizer))
        if self._bound is None or self._bound[0] != of:
            self._bound = (of, BoundTemplate(self.contract.template, self.tokenizer, bos=self.contract.bos))
        return self._bound[1]

    def trunk(self, **inputs: Any) -> Tensor:
        """Returns the last hidden states after the final norm, [B, W, D]; `inputs` are those of the model's forward."""
        if not self.contract.causal:  # it is all trunk, and has no cache to leave unused
            found: Tensor = self.lm(**inputs).last_hidden_state
            return found
        states: Tensor = self.lm.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the last hidden states [B, W, D] of rows padded on the right: int64 [B, W], and their lengths [B]."""
        if self.runner is not None:
            return self.runner(ids, lengths)
        mask = None if self.contract.causal else real_tokens(lengths, ids.shape[1]).long()
        return self.trunk(input_ids=ids, attention_mask=mask)

    def head(self, states: Tensor) -> Tensor:
        """Returns the LM head's logits [..., V] with the model's own scaling and soft-cap (Cohere, Granite, Gemma)."""
        logits: Tensor = self.lm.get_output_embeddings()(states)
        factor, divisor, cap = self._head_settings()
        if factor is not None:
            logits = logits * factor
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def head_matrix(self) -> Tensor | None:
        """The LM head's weight [V, D], where the head is a product with it and nothing else; else None."""
        head = self.lm.get_output_embeddings()
        bare = type(head) is torch.nn.Linear and getattr(head, "bias", None) is None
        return head.weight if bare and not any(each is not None for each in self._head_settings()) else None

    def _head_settings(self) -> tuple[float | None, float | None, float | None]:
        """Returns the logits' factor, divisor and soft-cap in the configuration, None where it says nothing."""
        config = self.lm.config.get_text_config()
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        factor, divisor, cap = (getattr(config, name, None) for name in names)
        return factor, divisor, cap

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Returns token ids int64 [B, W], padded on the right, and lengths int64 [B], on the model's device."""
        return pad_rows(rows, self.pad_id, self.device)

    def embed(
        self,
        rows: Sequence[Sequence[int]],
        slots: int | Sequence[int],
        token_budget: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> Tensor:
        """Returns the vectors of token id rows, float [n, D], in the order of the rows.

        Rows are sorted by length and cut into batches of at most `token_budget` tokens, padding included. Gradients
        are kept where grad mode is on.

        Args:
            rows: Token ids, template included; a decoder's end with their slots.
            slots: K, one for all rows or one per row.
            token_budget: See `budget_batches`; None takes `TOKEN_BUDGET` for the model's device.
            on_batch: Called after each batch with its number of rows.
        """
        # One array for all: vectors of one batch each would lie between the states of that batch and of the next, where
        # the room of the former is then of no use to the latter.
        vectors = torch.empty(len(rows), self.dim, device=self.device)
        for part in self.passes(rows, slots, token_budget, on_batch):
            numbers = torch.from_numpy(part.numbers).to(self.device)
            vectors[numbers] = self.pool(part.states, part.ends, part.counts)
        return vectors

    def passes(
        self,
        rows: Sequence[Sequence[int]],
        slots: int | Sequence[int],
        token_budget: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> Iterator[Pass]:
        """Runs rows through the model batch by batch, each when it is asked for; see `embed` for the arguments."""
        per_row = [slots] * len(rows) if isinstance(slots, int) else list(slots)
        budget = token_budget or TOKEN_BUDGET.get(self.device.type, 16384)
        for batch in budget_batches([len(row) for row in rows], budget):
            ids, lengths = self.pad([rows[i] for i in batch])
            states = self.states(ids, lengths)
            yield Pass(batch, states, lengths, [per_row[i] for i in batch])
            if on_batch is not None:
                on_batch(len(batch))

    def pool(self, states: Tensor, ends: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns the vectors of rows, float32 [B, D], pooled and at unit length as the contract says.

        Args:
            states: [B, W, hidden size].
            ends: int64 [B], one past the last token, which in a decoder's row is the last slot.
            counts: Slots per row.
        """
        vectors = POOLS[self.contract.pooling](states, ends, counts)
        if self.projection is not None:
            vectors = self.projection(vectors.to(states.dtype)).float()
        return F.normalize(vectors, dim=-1) if self.contract.normalise else vectors

    def encode(
        self,
        texts: Sequence[str],
        side: SideName,
        token_budget: int | None = None,
        max_length: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> Tensor:
        """Returns the vectors of texts, float32 [n, D] on the CPU, without gradients. See `embed`."""
        return self.encode_rows(self.tokenise(texts, side, max_length), side, token_budget, on_batch)

    def tokenise(self, texts: Sequence[str], side: SideName, max_length: int | None = None) -> list[list[int]]:
        """Returns what `encode_rows` takes, in whatever thread; ConfigError where `max_length` does not do."""
        length = max_length or self.contract.length(side)
        self.check_length(length, f"a {side} length")
        return self.bind().encode(texts, side, length)

    def encode_rows(
        self, rows: Sequence[Sequence[int]], side: SideName, token_budget: int | None, on_batch: OnBatch | None
    ) -> Tensor:
        """Returns the vectors of rows that `tokenise` made, float32 [n, D] on the CPU, without gradients."""
        training = self.lm.training
        self.lm.eval()
        with torch.inference_mode():
            vectors = self.embed(rows, len(getattr(self.contract.template, side).slots), token_budget, on_batch)
        self.lm.train(training)
        return vectors.float().cpu()

    def check_length(self, length: int, what: str) -> None:
        """Raises ConfigError for rows that are longer than the model has positions for."""
        if self.positions is not None and length > self.positions:
            raise ConfigError(f"{what} of {length} tokens is more than the {self.positions} positions of {self.name}")

    def check_lengths(self) -> None:
        """Refuses a contract whose lengths leave no room for text, or are beyond the model's positions.

        Raises:
            ConfigError: They are.
        """
        template = self.bind()
        for side in SIDES:
            self.check_length(self.contract.length(side), f"a {side} length")
            template.wrap([], side, self.contract.length(side))

    def add_missing_tokens(self) -> list[int]:
        """Adds the slot tokens that the tokenizer lacks, resizes the embeddings, and returns the new ids."""
        missing = missing_tokens(self.contract.template, self.tokenizer)
        if not missing:
            return []
        if self.tokenizer.eos_token_id is None and "</s>" in missing:
            self.tokenizer.add_special_tokens({"eos_token": "</s>"})
        self.tokenizer.add_tokens(missing, special_tokens=True)
        rows = self.lm.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) > rows:
            # New rows are drawn like the old ones, where there are any: see `load_model` without weights.
            self.lm.resize_token_embeddings(len(self.tokenizer), mean_resizing=self.device.type != "meta")
        ids: list[int] = self.tokenizer.convert_tokens_to_ids(missing)
        return ids

    def save(self, folder: Path, extra_files: dict[str, str] | None = None) -> None:
        """Publishes the model folder in one rename: config, safetensors, tokenizer, and the contract with its probe.

        Args:
            folder: Must not exist yet.
            extra_files: Names and contents of text files that go along.
        """
        publish_model(self.lm, self.tokenizer, folder, extra_files or {}, self._record)

    def _record(self, folder: Path) -> dict[str, Any]:
        return contracts.make_record(folder, self.contract, self.make_probe(), has_head=self.has_head)

    def make_probe(self) -> dict[str, Any]:
        """Returns texts with the token ids and vectors that this model gives them, as JSON values."""
        template = self.bind()
        dtype = str(next(self.lm.parameters()).dtype).removeprefix("torch.")
        entries = []
        for side in SIDES:
            vectors = self.encode(PROBE_TEXTS, side)
            ids = template.encode(PROBE_TEXTS, side, self.contract.length(side))
            for text, row, vector in zip(PROBE_TEXTS, ids, vectors.tolist(), strict=True):
                entries.append({"side": side, "text": text, "ids": row, "vector": [round(x, 7) for x in vector]})
        return {"dtype": dtype, "entries": entries}

    def check_probe(self, probe: dict[str, Any], folder: Path) -> None:
        """Recomputes the probe's token ids and vectors.

        Raises:
            ModelError: They differ from what was saved; says what, and by how much.
        """
        template = self.bind()
        saved, now = getattr(torch, probe["dtype"]), next(self.lm.parameters()).dtype
        tolerance = max(TOLERANCE.get(saved, 5e-2), TOLERANCE.get(now, 5e-2))
        for side in SIDES:
            entries = [entry for entry in probe["entries"] if entry["side"] == side]
            texts = [entry["text"] for entry in entries]
            for entry, row in zip(entries, template.encode(texts, side, self.contract.length(side)), strict=True):
                if entry["ids"] != row:
                    what = contracts.describe_difference(entry["ids"], row)
                    raise ModelError(f"{folder}: the tokenizer is not the one the model was saved with: {what}")
            vectors = self.encode(texts, side)
            worst = float((vectors - torch.tensor([entry["vector"] for entry in entries])).abs().max())
            if not worst <= tolerance:  # also catches NaN
                raise ModelError(
                    f"{folder}: the weights do not give the vectors they gave when saved: "
                    f"largest difference {worst:.2g}, allowed {tolerance:.2g} in {str(now).removeprefix('torch.')}"
                )


def positions_of(lm: Any) -> int | None:
    """Returns the longest row that a model has positions for, None where it names no limit."""
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # RoBERTa and its like count positions from behind that of padding, which their tables have a row for.
    tables = (module for name, module in lm.named_modules() if name.endswith("position_embeddings"))
    padding = next((place for table in tables if (place := getattr(table, "padding_idx", None)) is not None), -1)
    return limit - padding - 1


def pad_id_of(tokenizer: Any) -> int:
    """Returns the id that fills rows up; never seen by a real token."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids int64 [B, W], padded on the right, and lengths int64 [B], on a device."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids.to(device), lengths.to(device)
