"""Opening a model folder: a saved llara model with its contract, a base model, or a published checkpoint.

What it holds is told by `kinds.py`, how it is used by `agreement.py`; here it is read and checked.
"""

import importlib.util
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from llara import contract as contracts
from llara.agreement import agree_on_contract, agree_on_template, describe_contract
from llara.backends import use_backend
from llara.config import Dtype, ModelConfig, TrainConfig
from llara.contract import Contract
from llara.errors import ConfigError, MissingExtra, ModelError
from llara.files import sha256_file, write_json_atomic
from llara.hardware import WORKS, probe_torch
from llara.hub import CONVERT, resolve
from llara.kinds import class_of, refuse_reranker
from llara.model import EmbeddingModel
from llara.onednn import use_onednn
from llara.parity import check_direction
from llara.progress import note
from llara.projection import attach_projection
from llara.templates import BoundTemplate, Template

LEAST_QUERY, LEAST_PASSAGE = 32, 96  # tokens of text that a default length leaves room for
POOLER = "pooler"


def load_model(
    config: ModelConfig,
    *,
    for_training: bool = False,
    new_template: bool = False,
    weights: bool = True,
    usual: Template | None = None,
) -> EmbeddingModel:
    """Opens the model that a job's configuration names.

    A folder with `llara.json` is checked: sizes, tokenizer, contract, and the probe's ids and vectors; with
    `config.verify` also the checksum of its weights. A folder without one gets its contract from the configuration.

    Args:
        config: Names the model, and how to load it.
        for_training: Add the slot tokens that the tokenizer lacks, instead of refusing.
        new_template: The job may give a saved model another template or BOS setting (training does).
        weights: False reads none, and needs none: the model's tensors then have shapes and types but no content. Its
            tokenizer and contract are as ever.
        usual: The template where neither configuration nor folder names one, if it is for this kind of model; None
            takes `paper`.

    Raises:
        ModelError: No such model, an incomplete or changed folder, weights that are not safetensors, or an encoder of
            which nobody says how its vectors are read.
        ConfigError: A template or BOS setting that contradicts the model's contract, or is for another kind of model.
    """
    folder = resolve(config.model, offline=config.offline, remote_code=config.trust_remote_code, weights=weights)
    record = contracts.read_record(folder)
    if record is not None and weights:
        contracts.check_files(folder, record, full=config.verify)
    refuse_reranker(folder)
    saved = Contract.from_dict(record["contract"], str(folder / contracts.FILE_NAME)) if record else None
    template, own = agree_on_template(saved, config, folder, usual)
    tokenizer = load_tokenizer(folder, config)
    contract = agree_on_contract(saved, config, tokenizer, template, new_template=new_template)
    encoder = template.encoder
    lm, has_head = (_load_weights if weights else _outline)(folder, config, encoder=encoder)
    if encoder:
        attach_projection(lm, folder, own.projection if own else None)
    model = EmbeddingModel(
        lm, tokenizer, saved or contract, lambda: _fingerprint(folder, record, contract), config.model
    )
    model.has_head = has_head and (record is None or record["has_head"])
    if record is None:
        note(f"{config.model}: {describe_contract(contract, own)}")
        if weights:
            check_direction(model)  # a saved model's probe has shown as much
    else:
        if weights and not is_quantized(config):  # in 4 bits its vectors are near those of the probe, and no more
            model.check_probe(record["probe"], folder)
        if contract != saved:
            note(f"{config.model}: was saved with other settings; now template {contract.template.name}")
    model.contract = contract  # another one than was saved only where the job may change it
    if for_training:
        model.new_tokens = model.add_missing_tokens()
    bound = model.bind()  # refuses a tokenizer that lacks a slot token now, not at the first batch
    _check_rows(model, bound, folder)
    if contract != saved:
        model.contract = with_room(contract, bound, model.positions)
    if weights:
        use_backend(model, config)
    return model


def with_room(contract: Contract, template: BoundTemplate, positions: int | None) -> Contract:
    """Returns the contract with lengths that a new template leaves room in, and that the model has positions for."""
    query, passage = template.query.overhead, template.passage.overhead
    limit = positions or sys.maxsize
    return replace(
        contract,
        query_length=min(max(contract.query_length, query + LEAST_QUERY), limit),
        passage_length=min(max(contract.passage_length, passage + LEAST_PASSAGE), limit),
    )


def _check_rows(model: EmbeddingModel, template: BoundTemplate, folder: Path) -> None:
    """Refuses a tokenizer with tokens that the embeddings have no row for; unused special tokens may lie beyond."""
    rows = int(model.lm.get_input_embeddings().weight.shape[0])
    sides = (template.query, template.passage)
    highest = max(model.tokenizer.vocab_size - 1, *(max((*side.prefix, *side.suffix), default=0) for side in sides))
    if highest >= rows:
        raise ModelError(
            f"{folder}: its tokenizer has {highest + 1:,} tokens and its embeddings have {rows:,} rows, so it is not "
            "the tokenizer of this model; copy the right one from the base model"
        )


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """Returns the tokenizer of a folder.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json is missing); copy it from the base model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the tokenizers library raises no narrower kind
        raise ModelError(f"{folder}: its tokenizer cannot be read: {first_line(error)}") from error


def trains_in_full(config: ModelConfig) -> bool:
    """Tells whether weights must be float32 although they run in less: small updates vanish in bfloat16 weights."""
    return isinstance(config, TrainConfig) and config.lora_rank == 0 and config.dtype == "auto"


def pick_device(name: str) -> torch.device:
    """Returns the device that a configuration names; `auto` prefers a GPU.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    with suppress(RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    raise ConfigError(f"--device: {name!r} is not available here")


def device_of(config: ModelConfig) -> torch.device:
    """Returns the device of a job: the CPU where only it will do; raises as `pick_device` does."""
    return torch.device("cpu") if config.backend != "torch" or config.dtype == "int8" else pick_device(config.device)


def pick_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of the weights as they are loaded; `auto` is float32 but on a GPU that has bfloat16.

    Those of `int8` are float32, and rounded afterwards.

    Raises:
        ConfigError: bfloat16 on a CPU that cannot do it; a child process has tried.
    """
    if name == "bfloat16" and device.type == "cpu":
        _, _, verdict = probe_torch()
        if verdict != WORKS:
            raise ConfigError(f"--dtype: bfloat16 on this CPU {verdict}")
    if name == "int8":
        return torch.float32
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def _load_weights(folder: Path, config: ModelConfig, *, encoder: bool) -> tuple[Any, bool]:
    """Returns the model in evaluation mode, and whether the folder held an LM head."""
    quantized = _quantization(config) if is_quantized(config) else {}
    lm, missing = read_weights(*class_of(folder, encoder=encoder), folder, config, **quantized)
    if encoder:
        missing = {key for key in missing if not key.startswith(f"{POOLER}.")}
        drop_pooler(lm)
    elif lm.base_model is lm:
        raise ModelError(f"{folder}: {type(lm).__name__} does not say which part of it lies below the LM head")
    head = {key for key in missing if key.startswith(("lm_head", "embed_out", "output"))} if not encoder else set()
    if missing - head:
        raise _incomplete(folder, missing - head)
    if not quantized:  # weights of 4 bits have no gradient
        lm.requires_grad_(True)
    return lm, not (head or encoder)


def drop_pooler(lm: Any) -> None:
    """Removes the layer that BERT and its like have behind the first token's state, in place: no vector is read there.

    A checkpoint may lack its weights, which would then be random, and no gradient would reach them.
    """
    if hasattr(lm, POOLER):
        setattr(lm, POOLER, None)


def is_quantized(config: ModelConfig) -> bool:
    """Tells whether a job holds its base model in 4 bits."""
    return isinstance(config, TrainConfig) and config.quantize != "none"


def _quantization(config: ModelConfig) -> dict[str, Any]:
    """Returns what transformers is to be told to load a model in 4 bits (NF4, double quantisation: QLoRA, section 3).

    Raises:
        MissingExtra: bitsandbytes is not installed.
        ConfigError: It has no GPU to work on.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("--quantize 4bit", "quantize")
    device = pick_device(config.device)
    if device.type != "cuda":
        raise ConfigError(f"--quantize: 4bit takes a GPU, and this job runs on {device.type}; leave it at none")
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype(config.dtype, device),
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def read_weights(
    auto: Any, what: str, folder: Path, config: ModelConfig, name: str = "", **settings: Any
) -> tuple[Any, set[str]]:
    """Returns a model in evaluation mode on its device, and the names of the weights that the folder lacks.

    Args:
        auto: A class of transformers that picks the model's own class.
        what: What the model is loaded as, for errors.
        folder: Where config and safetensors are.
        config: How they are loaded.
        name: What the user calls the model, where it is not the one of the configuration.
        settings: Further settings of the model's configuration.

    Raises:
        ModelError: No safetensors, or weights that cannot be loaded as asked.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar for reading weights says little, and ours tell the rest
    if not list(folder.glob("*.safetensors")):
        other = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
        raise ModelError(
            f"{folder}: holds no .safetensors weights (others: {other}); {CONVERT.format(name or config.model)}"
        )
    device = device_of(config)
    in_full = trains_in_full(config) or config.backend != "torch"  # another backend rounds by itself
    dtype = pick_dtype(config.dtype, device)  # asked even so: it refuses what kills a process
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # whoever calls this judges what is missing
    try:  # without attn_implementation: SDPA where the model has it, else eager, which `parity` then finds
        lm, info = auto.from_pretrained(
            folder,
            dtype=torch.float32 if in_full else dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=config.trust_remote_code,
            **settings,
        )
    except Exception as error:  # a damaged config.json can fail anywhere in transformers
        raise ModelError(f"{folder}: cannot be loaded as {what}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    if info["mismatched_keys"]:
        raise _incomplete(folder, info["mismatched_keys"])
    placed = lm if "device_map" in settings else lm.to(device)  # weights of 4 bits stay where they were made
    if device.type == "cpu" and config.backend == "torch" and config.dtype != "int8":
        use_onednn(placed.base_model)
    return placed.eval(), set(info["missing_keys"])


def _incomplete(folder: Path, keys: Iterable[object]) -> ModelError:
    faults = sorted(map(str, keys))
    return ModelError(f"{folder}: weights are missing or of the wrong shape: {', '.join(faults[:5])}")


def _outline(folder: Path, config: ModelConfig, *, encoder: bool) -> tuple[Any, bool]:
    """Returns the model as its configuration describes it, on the device `meta`: no tensor holds anything.

    Whether the folder holds an LM head is taken on trust.
    """
    from transformers import AutoConfig

    auto, what = class_of(folder, encoder=encoder)
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            lm: Any = auto.from_config(settings, dtype=torch.float32, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a damaged config.json can fail anywhere in transformers
        raise ModelError(f"{folder}: cannot be made {what}: {first_line(error)}") from error
    drop_pooler(lm)
    return lm.requires_grad_(True).eval(), not encoder


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; those of transformers run over many."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def write_contract(folder: Path, contract: Contract) -> None:
    """Gives a folder that has none a contract and its probe: a base model then says how it is to be used."""
    bos: Literal["auto", "yes", "no"] = "auto" if not contract.causal else "yes" if contract.bos else "no"
    model = load_model(ModelConfig(model=str(folder), template=contract.template.name, bos=bos))
    model.contract = contract
    write_json_atomic(folder / contracts.FILE_NAME, contracts.make_record(folder, contract, model.make_probe()))


def _fingerprint(folder: Path, record: dict[str, Any] | None, contract: Contract) -> str:
    """Returns the fingerprint of a folder as its record has it, or, without a record, of its files as they are."""
    if record is not None:
        saved = Contract.from_dict(record["contract"], str(folder / contracts.FILE_NAME))
        return contracts.fingerprint({name: entry["sha256"] for name, entry in record["files"].items()}, saved)
    return contracts.fingerprint(
        {name: sha256_file(folder / name) for name in contracts.loaded_files(folder)}, contract
    )
