"""Rerankers: a decoder with a head of one output, which scores a query with a document (RankLLaMA, section 3.2).

Shapes: B rows of one batch, W their padded width, D hidden size, n pairs in all.

Rows are padded on the right and the state of each row's last token is scored: under causal attention no real token sees
padding, so that no mask is needed.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llara import contract as contracts
from llara.agreement import adds_bos
from llara.batching import budget_batches
from llara.config import ModelConfig
from llara.errors import ConfigError, ModelError
from llara.files import sha256_file
from llara.hub import CONVERT, resolve
from llara.int8 import is_int8, quantize_linears
from llara.loading import first_line, load_tokenizer, read_weights
from llara.model import TOKEN_BUDGET, TOLERANCE, OnBatch, pad_id_of, pad_rows, positions_of
from llara.pairs import PairContract, PairEncoder, load_pair_template
from llara.progress import note
from llara.publishing import publish_model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD = "score"  # what transformers calls the head of a decoder for sequence classification
PROBE = (
    ("why is the sky blue", "Air scatters short wavelengths of light more than long ones."),
    ("为什么天空是蓝色的", "하늘은 왜 파란가요?"),
    ("read a file line by line </s>", "def read_lines(path):\n    return open(path).read().splitlines()"),
)
Scores = npt.NDArray[np.float32]


class Reranker:
    """A decoder with a score head, its tokenizer and its contract.

    ```python
    reranker = Reranker.load("models/reranker")
    reranker.score(["why is the sky blue"] * 2, ["Air scatters ...", "Foxes jump."])  # float32 [2]
    ```

    Attributes:
        lm: The transformers model; LoRA layers may be injected into it.
        tokenizer: Its tokenizer.
        contract: How a query and a document become a score.
        name: What the user called the model.
        new_tokens: Always empty: a reranker adds no tokens.
    """

    def __init__(
        self, lm: Any, tokenizer: Any, contract: PairContract, fingerprint: str | Callable[[], str], name: str
    ) -> None:
        self.lm, self.tokenizer, self.contract = lm, tokenizer, contract
        self._fingerprint, self.name = fingerprint, name
        self.new_tokens: list[int] = []

    @classmethod
    def load(cls, model: str, **settings: Any) -> "Reranker":
        """Opens a model folder, a folder of a PEFT adapter, or a hub id; `settings` are fields of `ModelConfig`.

        Raises:
            ModelError: The folder is incomplete, was changed, fails its probe, or is no reranker.
            ConfigError: A setting contradicts the model's contract.
        """
        return load_reranker(ModelConfig(model=str(model), **settings))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that stands for weights, tokenizer and contract as they were loaded."""
        return self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = next(self.lm.parameters()).device
        return device

    @property
    def dtype(self) -> str:
        """Type that it runs in."""
        return "int8" if is_int8(self.lm) else str(next(self.lm.parameters()).dtype).removeprefix("torch.")

    def bind(self) -> PairEncoder:
        """Returns the contract bound to the tokenizer.

        Raises:
            ConfigError: Lengths that leave no room for a document, or are beyond the model's positions.
            ModelError: The tokenizer lacks a token that the contract asks for.
        """
        limit = positions_of(self.lm)
        if limit is not None and self.contract.length > limit:
            raise ConfigError(f"a length of {self.contract.length} tokens is more than the {limit} of {self.name}")
        return PairEncoder(self.contract, self.tokenizer)

    def score(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        titles: Sequence[str] | None = None,
        token_budget: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> Scores:
        """Returns the score of each query with its document, float32 [n]; the larger, the more relevant.

        Titles are joined as the contract says. Batches are cut as `logits` cuts them.

        Raises:
            ConfigError: Queries, documents and titles differ in number, or are one string instead of a list.
        """
        titles = [""] * len(documents) if titles is None else titles
        if any(isinstance(each, str) for each in (queries, documents, titles)):
            raise ConfigError("queries, documents and titles: give lists, not one string")
        if not len(queries) == len(documents) == len(titles):
            numbers = f"{len(queries)} queries, {len(documents)} documents and {len(titles)} titles"
            raise ConfigError(f"{numbers} make no pairs; give one of each per pair")
        joined = [self.contract.join_title(title, text) for title, text in zip(titles, documents, strict=True)]
        rows = self.bind().rows(queries, joined)
        training = self.lm.training
        self.lm.eval()
        with torch.inference_mode():
            scores: Scores = self.logits(rows, token_budget, on_batch).cpu().numpy()
        self.lm.train(training)
        return scores

    def logits(
        self, rows: Sequence[Sequence[int]], token_budget: int | None = None, on_batch: OnBatch | None = None
    ) -> Tensor:
        """Returns the head's output at the last token of each row, float32 [n], in the order of the rows.

        Rows are sorted by length and cut into batches of at most `token_budget` tokens, padding included. Gradients
        are kept where grad mode is on. `on_batch` is called after each batch with its number of rows.
        """
        budget = token_budget or TOKEN_BUDGET.get(self.device.type, 16384)
        scores = torch.empty(len(rows), device=self.device)  # one array for all: see `EmbeddingModel.embed`
        for batch in budget_batches([len(row) for row in rows], budget):
            ids, ends = pad_rows([rows[i] for i in batch], pad_id_of(self.tokenizer), self.device)
            scores[torch.from_numpy(batch).to(self.device)] = self.logits_of(ids, ends)
            if on_batch is not None:
                on_batch(len(batch))
        return scores

    def logits_of(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Returns the scores of one padded batch, float32 [B]; ids int64 [B, W], ends int64 [B] count real tokens."""
        states = self.lm.base_model(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
        last = states[torch.arange(len(ends), device=states.device), ends - 1]
        head = getattr(self.lm, HEAD)
        with torch.autocast(last.device.type, enabled=False):  # or scores that are told apart would be rounded alike
            scores: Tensor = head(last.to(head.weight.dtype))[:, 0].float()
        return scores

    def save(self, folder: Path, extra_files: dict[str, str] | None = None) -> None:
        """Publishes the model folder in one rename: config, safetensors, tokenizer, and the contract with its probe.

        Args:
            folder: Must not exist yet.
            extra_files: Names and contents of text files that go along.
        """
        # transformers scores the last token that is not padding: with padding by EOS, it would pass the EOS over.
        pad, ends = self.tokenizer.pad_token_id, set(self.bind().ends)
        self.lm.config.pad_token_id = None if pad in ends else pad
        publish_model(self.lm, self.tokenizer, folder, extra_files or {}, self._record)

    def _record(self, folder: Path) -> dict[str, Any]:
        return contracts.make_record(folder, self.contract, self.make_probe(), form=contracts.RERANKER)

    def make_probe(self) -> dict[str, Any]:
        """Returns pairs with the token ids and scores that this model gives them, as JSON values."""
        queries, documents = ([pair[side] for pair in PROBE] for side in (0, 1))
        found = zip(PROBE, self.bind().rows(queries, documents), self.score(queries, documents).tolist(), strict=True)
        entries = [
            {"query": query, "document": document, "ids": ids, "score": score}
            for (query, document), ids, score in found
        ]
        return {"dtype": self.dtype, "entries": entries}

    def check_probe(self, probe: dict[str, Any], folder: Path) -> None:
        """Recomputes the probe's token ids and scores.

        Raises:
            ModelError: They differ from what was saved; says what, and by how much.
        """
        queries, documents = ([entry[side] for entry in probe["entries"]] for side in ("query", "document"))
        for entry, row in zip(probe["entries"], self.bind().rows(queries, documents), strict=True):
            if entry["ids"] != row:
                what = contracts.describe_difference(entry["ids"], row)
                raise ModelError(f"{folder}: the tokenizer is not the one the model was saved with: {what}")
        tolerance = max(TOLERANCE.get(getattr(torch, name), 5e-2) for name in (probe["dtype"], self.dtype))
        saved = np.array([entry["score"] for entry in probe["entries"]], np.float32)
        # A score has no fixed scale, so what is allowed grows with it; 10, for it is a sum over the hidden size.
        apart = np.abs(self.score(queries, documents) - saved) / (10 * np.maximum(np.abs(saved), 1))
        if not apart.max(initial=0.0) <= tolerance:  # also catches NaN
            raise ModelError(f"{folder}: the weights do not give the scores they gave when saved")


def load_reranker(
    config: ModelConfig,
    *,
    for_training: bool = False,
    base: str | None = None,
    query_length: int | None = None,
    length: int | None = None,
) -> Reranker:
    """Opens the reranker that a job's configuration names.

    A folder with `llara.json` is checked: sizes, tokenizer, contract, and the probe; with `config.verify` also the
    checksum of its weights. A published checkpoint and a PEFT adapter (merged into its base model) get their contract
    from the configuration.

    Args:
        config: Names the model, and how to load it.
        for_training: Any decoder will do: it gets a new head where it has none.
        base: The base model of an adapter, instead of the one that the adapter names.
        query_length: Tokens of a query, prompt included, instead of what the contract says.
        length: Tokens of a pair, instead of what the contract says.

    Raises:
        ModelError: No such model, an incomplete or changed folder, no safetensors, or no reranker.
        ConfigError: A template or BOS setting that contradicts the model's contract, or a base for a whole model.
    """
    folder = resolve(
        config.model,
        offline=config.offline,
        remote_code=config.trust_remote_code,
        marks=("config.json", contracts.ADAPTER),
    )
    trained = not for_training or contracts.form_of(folder) == contracts.RERANKER
    record = contracts.read_record(folder, contracts.RERANKER) if trained else None
    if record is not None:
        contracts.check_files(folder, record, full=config.verify)
    adapter = contracts.is_adapter(folder)
    if base is not None and not adapter:
        raise ConfigError(f"--base: goes with an adapter, and {config.model} is a whole model; leave it out")
    below, name = _base_of(folder, config, base) if adapter else (folder, config.model)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = load_tokenizer(folder if has_tokenizer else below, config)
    contract = _agree(record, config, tokenizer, folder, for_training=for_training)
    lm = _load_classifier(below, config, name, needs_head=not (for_training or adapter))
    if adapter:
        lm = _merge_adapter(lm, folder, needs_head=not _has_head(below))
    model = Reranker(lm, tokenizer, contract, lambda: _fingerprint(record, {folder, below}, contract), config.model)
    if record is None:
        what = "is no reranker of llara yet" if for_training else f"no {contracts.FILE_NAME} in the folder"
        note(f"{config.model}: {what}; using template {contract.template.name}, BOS {'yes' if contract.bos else 'no'}")
    elif contract == PairContract.from_dict(record["contract"], str(folder)):
        model.check_probe(record["probe"], folder)
    model.contract = contract.with_lengths(query_length, length)
    model.bind()
    if config.dtype == "int8":
        quantize_linears(model.lm, model.name, keep=getattr(model.lm, HEAD))
    return model


def _agree(
    record: dict[str, Any] | None, config: ModelConfig, tokenizer: Any, folder: Path, *, for_training: bool
) -> PairContract:
    """Joins what the folder says with what the configuration asks for; a contradiction is an error."""
    template = load_pair_template(config.template) if config.template else None
    if record is None:
        contract = PairContract(bos=adds_bos(tokenizer) if config.bos == "auto" else config.bos == "yes")
        return replace(contract, template=template) if template else contract
    saved = PairContract.from_dict(record["contract"], str(folder / contracts.FILE_NAME))
    bos = saved.bos if config.bos == "auto" else config.bos == "yes"
    asked = replace(saved, template=template or saved.template, bos=bos)
    if asked != saved and not for_training:
        what = "--template" if asked.template != saved.template else "--bos"
        raise ConfigError(
            f"{what}: {config.model} was saved with template {saved.template.name!r} and BOS "
            f"{'yes' if saved.bos else 'no'}; leave the flag out"
        )
    return asked


def _load_classifier(folder: Path, config: ModelConfig, name: str, *, needs_head: bool) -> Any:
    from transformers import AutoModelForSequenceClassification

    lm, missing = read_weights(
        AutoModelForSequenceClassification, "a reranker with one score", folder, config, name, num_labels=1
    )
    head = getattr(lm, HEAD, None)
    if not isinstance(head, nn.Linear) or lm.base_model is lm:
        raise ModelError(f"{folder}: {type(lm).__name__} is no decoder with a score head, which a reranker here is")
    missing -= {f"{HEAD}.{name}" for name in ("weight", "bias")} if not needs_head else set()
    if any(name.startswith(HEAD) for name in missing):
        raise ModelError(
            f"{folder}: has no score head, so it is no reranker; make one with: llara finetune --task rerank"
        )
    if missing:
        raise ModelError(f"{folder}: weights are missing: {', '.join(sorted(missing)[:5])}")
    lm.requires_grad_(True)
    return lm


# Adapters ----------------------------------------------------------------------------------------------------------


def _base_of(folder: Path, config: ModelConfig, base: str | None) -> tuple[Path, str]:
    """Returns the folder of an adapter's base model, and what it is called.

    Raises:
        ModelError: The adapter's weights are pickled, or it names no base model.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{folder}: holds no {ADAPTER_WEIGHTS}; {CONVERT.format(config.model)}")
    if base is None:
        try:
            named = json.loads((folder / contracts.ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder / contracts.ADAPTER}: cannot be read as JSON: {first_line(error)}") from error
        if not isinstance(named, str) or not named:
            raise ModelError(f"{folder / contracts.ADAPTER}: names no base model; give it with --base")
        base = named
        note(f"{folder}: an adapter of {base}, which is opened with it")
    try:
        return resolve(base, offline=config.offline, remote_code=config.trust_remote_code), base
    except ModelError as error:
        raise ModelError(
            f"{error}; this is the base model of the adapter {folder}, give another place with --base"
        ) from error


def _merge_adapter(lm: Any, folder: Path, *, needs_head: bool) -> Any:
    from peft import PeftModel

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as weights:
        has_head = any(f".{HEAD}." in f".{name}" for name in weights.keys())  # noqa: SIM118  it is no mapping
    if needs_head and not has_head:
        raise ModelError(f"{folder}: holds no score head, and its base model has none; it is no reranker")
    try:
        with quiet_peft():
            merged = PeftModel.from_pretrained(lm, folder).merge_and_unload()
    except Exception as error:  # whatever does not fit: PEFT raises many kinds
        raise ModelError(f"{folder}: the adapter does not fit its base model: {first_line(error)}") from error
    return merged.requires_grad_(True).eval()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences what PEFT warns of that is right: a former name in transformers, and GPT-2's transposed matrices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def _has_head(folder: Path) -> bool:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            if f"{HEAD}.weight" in weights.keys():  # noqa: SIM118  it is no mapping
                return True
    return False


def _fingerprint(record: dict[str, Any] | None, folders: set[Path], contract: PairContract) -> str:
    """Returns the fingerprint of a folder as its record has it, else of the files of all folders as they are."""
    if record is not None:
        return contracts.fingerprint({name: entry["sha256"] for name, entry in record["files"].items()}, contract)
    checksums = [sha256_file(folder / name) for folder in sorted(folders) for name in contracts.loaded_files(folder)]
    return contracts.digest({"files": sorted(checksums), "contract": contract.to_dict()})
