"""What a job would take on GPUs that are not here, from the model's shapes alone: operations, time, memory.

Nothing is measured and no weights are needed. The model runs once on the device `meta`, where tensors have shapes and
no content: operations are counted in its own graph, and so is what the forward pass keeps for the backward pass. Time
is operations over the assumed share of the GPUs' peak. Reading, tokenising and traffic between GPUs are not in it.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from llara.config import ModelConfig, TrainConfig
from llara.hardware import Fleet
from llara.model import EmbeddingModel
from llara.plan.report import FleetEstimate, size
from llara.training.lora import add_lora

RUNTIME = 1_500_000_000  # the CUDA context, the libraries' workspace, and what the allocator cannot use
QUANTIZED = 0.52  # bytes of a weight in 4 bits, its share of the scales included (QLoRA, section 3)
LORA_RANK = 32  # what is proposed where all weights do not fit


class Pass(NamedTuple):
    """One row of `width` tokens through the model: operations, and bytes that its forward pass keeps."""

    width: int
    operations: float
    kept: int


@dataclass(frozen=True)
class Load:
    """What a job asks of one GPU: padded tokens in all, in one forward pass, and in one row."""

    cells: float
    cells_per_pass: int
    width: int
    slots: int
    """Positions per row that the LM head is applied to; none in encoding without sparse vectors."""


def run_on_meta(model: EmbeddingModel, width: int, slots: int, dtype: torch.dtype, *, train: bool) -> Pass:
    """Counts what one row takes, forward and, with `train`, backward.

    Args:
        model: Opened without weights.
        width: Tokens of the row, template included.
        slots: Positions whose logits are computed.
        dtype: Of weights and activations.
        train: Whether gradients are computed.
    """
    # Odd, and so unlike any other size in a model: what is `width` squared is then known to be attention's.
    width = max(width | 1, 3)
    lm = model.lm.to(dtype).train(train)
    weights = {weight.untyped_storage()._cdata for weight in lm.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Fused attention never keeps its weights, which on `meta`, where there is none, are part of the graph.
        if tensor.untyped_storage()._cdata not in weights and tuple(tensor.shape[-2:]) != (width, width):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    inputs = _inputs(model, width)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = _forward(model, inputs, slots)
        if train:
            loss.backward()  # type: ignore[no-untyped-call]
    lm.zero_grad(set_to_none=True)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Pass(width, float(counter.get_total_flops()), bytes_kept)


def _inputs(model: EmbeddingModel, width: int) -> dict[str, Tensor]:
    """Returns one row under a prepared mask, or, for a model that takes none (see `parity`), under a plain one.

    An encoder's row, which has no padding, is under none.
    """
    ids = torch.zeros(1, width, dtype=torch.long, device=model.device)
    if not model.contract.causal:
        return {"input_ids": ids}  # a mask of padding is looked at, and there is nothing to see on `meta`
    mask = torch.ones(1, 1, width, width, dtype=torch.bool, device=model.device)
    prepared = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    try:
        with torch.no_grad():
            model.trunk(**prepared)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return prepared


def _forward(model: EmbeddingModel, inputs: dict[str, Tensor], slots: int) -> Tensor:
    states = model.trunk(**inputs)
    if not slots:
        return states.float().sum()
    return model.head(states[:, -slots:]).float().logsumexp(dim=-1).sum()


def estimate_training(config: TrainConfig, model: EmbeddingModel, fleet: Fleet, load: Load) -> FleetEstimate:
    """Returns what training takes on each of the GPUs; `model` was opened without weights, and is changed."""
    half = fleet.gpu.bf16 and config.dtype in ("auto", "bfloat16")
    tricks = _Tricks(config.gradient_checkpointing, config.quantize == "4bit")
    graph = _count(config, model, load, half, config.lora_rank)
    memory = _training_memory(config, fleet, load, graph, half, tricks)
    advice = [] if fleet.gpu.bf16 else [f"{fleet.name} has no bfloat16: weights and arithmetic are float32"]
    if sum(memory.values()) > fleet.memory:
        advice += _advice(config, model, fleet, load, graph, memory, half)
    if fleet.number > 1:
        advice.append(f"start it with: torchrun --nproc-per-node {fleet.number} -m llara adapt ...")
    operations = graph.operations + (_again(config, model, load, half) if tricks.checkpointing else 0.0)
    return _estimate(config, fleet, load.cells * operations, memory, half, advice)


def estimate_encoding(config: ModelConfig, model: EmbeddingModel, fleet: Fleet, load: Load) -> FleetEstimate:
    """Returns what encoding takes, the corpus split over the GPUs; `model` was opened without weights."""
    half = config.dtype != "float32"
    dtype = _half(fleet) if half else torch.float32
    one = run_on_meta(model, load.width, load.slots, dtype, train=True)
    operations = run_on_meta(model, load.width, load.slots, dtype, train=False).operations / one.width
    layers = max(_layers(model), 1)
    count = sum(weight.numel() for weight in model.lm.parameters())
    # One layer's activations at a time, and its output beside its input: of what training keeps, two layers' share.
    memory = {
        "weights": count * (2 if half else 4),
        "activations": round(2 * one.kept / layers / one.width * load.cells_per_pass),
        "runtime": RUNTIME,
    }
    advice = [] if fleet.gpu.bf16 or not half else [f"{fleet.name} has no bfloat16: add --dtype float16"]
    if sum(memory.values()) > fleet.memory:
        advice.append("lower --token-budget, or take GPUs with more memory: encoding holds the whole model on each")
    if fleet.number > 1:
        advice.append("one worker per GPU: of one machine by default, of several with --engine ray --address HOST:PORT")
    return _estimate(config, fleet, load.cells * operations, memory, half, advice)


class _Tricks(NamedTuple):
    """What saves memory at the cost of time."""

    checkpointing: bool
    quantize: bool

    @property
    def flags(self) -> list[str]:
        """The flags that switch it on."""
        names = (("--gradient-checkpointing", self.checkpointing), ("--quantize 4bit", self.quantize))
        return [flag for flag, on in names if on]


TRICKS = (_Tricks(False, False), _Tricks(True, False), _Tricks(False, True), _Tricks(True, True))


class _Graph(NamedTuple):
    """What training does per padded token, with one rank of LoRA: operations, bytes kept; and how many weights."""

    operations: float
    kept: float
    trained: int
    frozen: int
    layers: int
    between: int
    """Bytes of the states between two layers, per padded token."""
    embedded: int
    """Frozen weights of embeddings and LM head, which 4 bits leave as they are."""


def _count(config: TrainConfig, model: EmbeddingModel, load: Load, half: bool, rank: int) -> _Graph:
    model = with_lora(model, config, rank) if rank else model
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.lm.parameters()]
    one = run_on_meta(model, load.width, load.slots, torch.bfloat16 if half else torch.float32, train=True)
    kept, mixed = one.kept / one.width, half and not rank and config.dtype == "auto"
    if mixed:
        # Mixed precision keeps the sums between layers in float32, and what goes into products in bfloat16.
        wide = run_on_meta(model, load.width, load.slots, torch.float32, train=True)
        kept = (kept + wide.kept / wide.width) / 2
    return _Graph(
        operations=one.operations / one.width,
        kept=kept,
        trained=sum(count for count, trained in sizes if trained),
        frozen=sum(count for count, trained in sizes if not trained),
        layers=max(_layers(model), 1),
        between=model.dim * (2 if half and not mixed else 4),
        embedded=sum(weight.numel() for weight in _embeddings(model) if not weight.requires_grad),
    )


def _again(config: TrainConfig, model: EmbeddingModel, load: Load, half: bool) -> float:
    """Returns the operations per padded token that gradient checkpointing does twice: the layers' forward pass.

    A third of a step's; half where hardly a weight has a gradient.
    """
    model = with_lora(model, config, config.lora_rank) if config.lora_rank else model
    one = run_on_meta(model, load.width, 0, torch.bfloat16 if half else torch.float32, train=False)
    return one.operations / one.width


def _training_memory(
    config: TrainConfig, fleet: Fleet, load: Load, graph: _Graph, half: bool, tricks: "_Tricks"
) -> dict[str, int]:
    """Returns what training holds on one GPU; LoRA and the weights of mixed precision are trained in float32."""
    width = 2 if config.dtype == "bfloat16" and not graph.frozen else 4
    frozen = graph.frozen * (2 if half else 4)
    if tricks.quantize:
        frozen = round((graph.frozen - graph.embedded) * QUANTIZED + graph.embedded * (2 if half else 4))
    kept = graph.kept / graph.layers + graph.layers * graph.between if tricks.checkpointing else graph.kept
    memory = {
        "weights": graph.trained * width + frozen,
        "gradients": graph.trained * width,
        "optimizer": 2 * graph.trained * width,
        "activations": round(kept * load.cells_per_pass),
        "runtime": RUNTIME,
    }
    if half and not graph.frozen and width == 4:
        memory["bfloat16 copy"] = 2 * graph.trained
    if fleet.number > 1:
        memory["exchange"] = graph.trained * width
    return memory


def _advice(
    config: TrainConfig,
    model: EmbeddingModel,
    fleet: Fleet,
    load: Load,
    graph: _Graph,
    memory: Mapping[str, int],
    half: bool,
) -> list[str]:
    """Returns the settings that would make training fit, each with what it then needs."""
    found = []
    room = int((fleet.memory - sum(memory.values()) + memory["activations"]) / max(graph.kept, 1))
    if room >= load.width:
        found.append(f"--token-budget {2 ** int(math.log2(room))} fits: shorter forward passes, the same result")
    for rank in [config.lora_rank] if config.lora_rank else [0, LORA_RANK]:
        counted = graph if rank == config.lora_rank else _count(config, model, load, half, rank)
        for tricks in TRICKS if rank else TRICKS[:2]:
            needed = sum(_training_memory(config, fleet, load, counted, half, tricks).values())
            if needed <= fleet.memory:
                flags = [*([f"--lora-rank {rank}"] if rank != config.lora_rank else []), *tricks.flags]
                found.append(f"{' '.join(flags)} fits: about {size(needed)} per GPU")
    states = sum(memory[name] for name in ("weights", "gradients", "optimizer"))
    sharded = sum(memory.values()) - memory.get("exchange", 0) - states + states // fleet.number
    if fleet.number > 1 and sharded <= fleet.memory:
        found.append(f"sharded by FSDP over the {fleet.number} (accelerate launch): about {size(sharded)} per GPU")
    return found or ["take GPUs with more memory, or a smaller model: none of the settings here is enough"]


def with_lora(model: EmbeddingModel, config: TrainConfig, rank: int) -> EmbeddingModel:
    """Returns a copy of the outline with LoRA in it."""
    outline = copy.copy(model)
    outline.lm, outline.new_tokens = copy.deepcopy(model.lm), []  # rows of new tokens are few
    add_lora(outline, replace(config, lora_rank=rank, quantize="none"))  # shapes are those of whole weights
    return outline


def _estimate(
    config: Any, fleet: Fleet, operations: float, memory: Mapping[str, int], half: bool, advice: list[str]
) -> FleetEstimate:
    peak = fleet.gpu.half if half else fleet.gpu.single
    return FleetEstimate(
        gpus=str(fleet),
        operations=operations * fleet.number,
        seconds=operations / (peak * 1e12 * config.peak_share),
        peak_tflops=peak,
        share=config.peak_share,
        memory=dict(memory),
        memory_gpu=fleet.memory,
        advice=tuple(advice),
    )


def _half(fleet: Fleet) -> torch.dtype:
    return torch.bfloat16 if fleet.gpu.bf16 else torch.float16


def _embeddings(model: EmbeddingModel) -> list[Tensor]:
    """Returns the weights of embeddings and LM head, tied ones once."""
    modules = (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())
    found = {id(weight): weight for module in modules if module is not None for weight in module.parameters()}
    return list(found.values())


def _layers(model: EmbeddingModel) -> int:
    return int(getattr(model.lm.config.get_text_config(), "num_hidden_layers", 1))
