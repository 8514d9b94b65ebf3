"""What a job's configuration says in the words of transformers.TrainingArguments."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainingArguments

from llara.config import TrainConfig
from llara.loading import pick_device


def training_arguments(
    config: TrainConfig, folder: Path, steps: int, *, autocast: bool, find_unused: bool
) -> TrainingArguments:
    """Returns Trainer's arguments for a run of `steps` optimizer steps in `folder`.

    Args:
        config: The job's configuration.
        folder: The work folder.
        steps: Optimizer steps of the run.
        autocast: Float32 weights run in bfloat16.
        find_unused: Some trained parameters get no gradient, which several processes must find out at every step.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=min(math.ceil(config.warmup * steps), steps - 1),  # its first step has a rate of 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=None,  # checkpoint.py removes the oldest
        report_to=list(config.report_to) or "none",
        seed=config.seed,
        use_cpu=pick_device(config.device).type == "cpu",
        bf16=autocast,
        # Sharded gradients are exchanged after every pass: kept until the last one, they would be held whole.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": shards()}},
        ddp_find_unused_parameters=find_unused,
        ddp_broadcast_buffers=False,  # they are constants, and passes differ in number from rank to rank
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    # Several GPUs in one process would mean nn.DataParallel, which splits batches that are no single tensors.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def shards() -> bool:
    """Tells whether `accelerate launch` was asked to shard the model over the processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def steps_for(config: TrainConfig, batches: float, processes: int = 1) -> int:
    """Returns the optimizer steps of a run: as configured, or what its batches come to, rounded up."""
    return config.steps or max(math.ceil(batches / (config.accumulation * processes)), 1)


def mixed_precision(config: TrainConfig, weight: Tensor) -> bool:
    """Tells whether float32 weights run in bfloat16: on a GPU that has it, unless a dtype was asked for."""
    gpu = weight.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return gpu and config.dtype == "auto" and weight.dtype == torch.float32


def precision(config: TrainConfig, weight: Tensor) -> str:
    """Returns how a run computes, for its identity: a run begun in one precision does not go on in another."""
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{dtype} in bfloat16" if mixed_precision(config, weight) else dtype
