"""transformers.Trainer, with batches that are a function of their number, exact resume, and losses that are sums.

Trainer brings the optimizer, the schedules, mixed precision, distributed training and the logging integrations. What is
replaced: its checkpoints (see checkpoint.py), its sampling (a batch is recomputed from seed and number, so a resumed
run sees what it would have seen), and its loss averaging (a sum over examples divided by their number over all ranks
and accumulation steps).
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from llara.config import TrainConfig
from llara.errors import ConfigError, LlaraError
from llara.model import write_errors
from llara.progress import Progress, note
from llara.training import checkpoint

Batch = dict[str, Any]


class Source(Protocol):
    """Where batches come from. A `Batch` is one forward pass: tensors by name, and

    `counts` (int64 [len(names)], how many examples each sum is over), `tokens` and `cells` (ints: real tokens, prompts
    included, and padded size).
    """

    @property
    def names(self) -> tuple[str, ...]:
        """What the loss sums over, in the order of a pass's `counts`."""
        ...

    @property
    def batches(self) -> int | None:
        """How many batches the whole run has, over all processes and accumulation steps; None: as many as are asked."""
        ...

    def passes(self, number: int) -> list[Batch]:
        """Returns one batch, cut into forward passes; the same number always gives the same ones."""
        ...

    def empty(self) -> Batch:
        """Returns a pass that counts nothing, for a process that has no batch left: zero loss, with a graph."""
        ...

    def describe(self, number: int) -> list[str]:
        """Returns the ids of the documents in a batch, for messages."""
        ...


class TrainModule(nn.Module):
    """A model with its objective: batch and counts in, loss and the sums it came from out."""

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scalar loss and float [len(names)], the detached sums behind it."""
        raise NotImplementedError


class _Numbered(Dataset[list[Batch]]):
    """The batches of one rank, each a list of passes: number i of rank r is number `i * world + r` of the run."""

    def __init__(self, source: Source, count: int, rank: int, world: int) -> None:
        self.source, self.count, self.rank, self.world = source, count, rank, world

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Batch]:
        number = index * self.world + self.rank
        if self.source.batches is not None and number >= self.source.batches:
            return [self.source.empty()]
        return self.source.passes(number)


def _only(batches: Sequence[list[Batch]]) -> list[Batch]:
    return batches[0]


class _Watcher(TrainerCallback):
    """Progress on stderr and one JSON line per log event in `log.jsonl`."""

    def __init__(self, trainer: "JobTrainer", label: str) -> None:
        self.trainer, self.label = trainer, label
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint brings the intervals of the run that made it; this run's own apply.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self.trainer.restore_sums()
        self.progress = Progress(self.label, state.max_steps, "steps")
        self.progress.__enter__()
        self.progress.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.progress is not None
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps count too, where log_every does not divide their number
        last = state.log_history[-1] if state.log_history else {}
        shown = {key: f"{last[key]:.4g}" for key in ("loss", "learning_rate") if key in last}
        self.progress.advance(1, **shown)

    def close(self, error: BaseException | None) -> None:
        """Ends the progress line; `error` is what stopped the run, if anything did."""
        if self.progress is not None:
            self.progress.__exit__(type(error) if error else None, error, None)


class JobTrainer(Trainer):
    """Runs one training job inside its work folder."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the count over all accumulation steps itself

    def __init__(
        self, module: TrainModule, source: Source, config: TrainConfig, folder: Path, steps: int, label: str
    ) -> None:
        self.source, self.config, self.folder, self.total_steps = source, config, folder, steps
        self.sums = torch.zeros(len(source.names), dtype=torch.float64)
        self.items = torch.zeros(len(source.names), dtype=torch.float64)
        self._resumed_from: Path | None = None
        autocast = mixed_precision(config, next(module.parameters()))
        super().__init__(model=module, args=_arguments(config, folder, steps, autocast=autocast))
        self.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to data
        self.remove_callback(ProgressCallback)
        self.watcher = _Watcher(self, label)
        self.add_callback(self.watcher)

    def run(self) -> dict[str, float]:
        """Trains to the end, from the newest checkpoint if there is one, and returns the last logged values."""
        found = checkpoint.list_checkpoints(self.folder)
        self._resumed_from = found[-1] if found else None
        if self._resumed_from is not None:
            checkpoint.check_checkpoint(self._resumed_from)
            note(f"resuming from {self._resumed_from.name}")
        failure: BaseException | None = None
        try:
            self.train(resume_from_checkpoint=str(self._resumed_from) if self._resumed_from else None)
        except BaseException as error:
            failure = error
            raise
        finally:
            self.watcher.close(failure)
        logged = [entry for entry in self.state.log_history if "loss" in entry]
        return {key: value for key, value in logged[-1].items() if isinstance(value, float)} if logged else {}

    # Batches ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[list[Batch]]:
        """Returns the batches of this rank, in order; Trainer skips what a resumed run has seen without loading it."""
        count = self.total_steps * self.args.gradient_accumulation_steps
        data = _Numbered(self.source, count, self.args.process_index, self.args.world_size)
        return DataLoader(data, batch_size=1, shuffle=False, collate_fn=_only)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Batch]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Batch]], Tensor]:
        """Returns the batches of one optimizer step and what they count together, over all ranks."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        counts = torch.stack([batch["counts"] for passes in batches for batch in passes]).sum(dim=0)
        self.items += counts
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(device), "sum")
        return batches, counts.to(device)

    def training_step(  # type: ignore[override]  # a batch is a list of passes
        self, model: nn.Module, inputs: list[Batch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs the passes of one batch forward and backward, and returns its share of the step's loss."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs, start=1):
            # Ranks exchange gradients once per step: Trainer says in which batch, and here it is its last pass.
            last = number == len(inputs)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model=model):
                loss = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        # Trainer walks into lists; token id rows stay lists until they are padded, and are long.
        moved = {key: value.to(self.args.device) for key, value in inputs.items() if isinstance(value, Tensor)}
        return {**inputs, **moved}

    def floating_point_ops(self, inputs: list[Batch]) -> int:  # type: ignore[override]
        """Returns 0: nobody reads Trainer's count."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Returns a pass's share of the step's loss; distributed training averages over ranks, hence the factor."""
        outputs: tuple[Tensor, Tensor] = model(inputs, num_items_in_batch)
        loss, sums = outputs
        self._require_finite("loss", loss)
        self.sums += sums.cpu().double()  # in this order: not every device has float64
        scaled: Tensor = loss * self.args.world_size
        return scaled

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called between the backward pass and the optimizer's step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        self._require_finite("gradient's norm", torch.as_tensor(norm))
        return norm

    def _require_finite(self, name: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise LlaraError(
                f"the {name} is {float(value.detach())} at step {self.state.global_step + 1}; nothing was updated "
                f"with it. Lower --learning-rate, or look at the data; checkpoints are in {self.folder}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss to a log entry, and writes it to log.jsonl."""
        if "loss" in logs:
            for name, total, count in zip(self.source.names, self.sums.tolist(), self.items.tolist(), strict=True):
                if count:
                    logs[f"loss_{name}"] = total / count
            self.sums.zero_()
            self.items.zero_()
        super().log(logs, start_time)
        if "loss" in logs and self.args.should_save:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.state.log_history[-1], sort_keys=True) + "\n")

    # Checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        staging = self.folder / ".tmp-staging"
        if self.args.should_save:
            checkpoint.clear_leftovers(self.folder)  # what a killed run staged would be taken for part of this one
        self.accelerator.wait_for_everyone()
        staging.mkdir(exist_ok=True)
        final, self.args.output_dir = self.args.output_dir, str(staging)
        try:
            with write_errors(staging):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = final
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staged = staging / f"checkpoint-{self.state.global_step}"
            checkpoint.save_sums(
                staged,
                {
                    "tr_loss": float(self._tr_loss),
                    "total_loss": self._total_loss_scalar,
                    "last_logged": self._globalstep_last_logged,
                    "sums": self.sums.tolist(),
                    "items": self.items.tolist(),
                },
            )
            checkpoint.publish_checkpoint(staged, self.folder, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        checkpoint.save_weights(self.accelerator.unwrap_model(self.model), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_weights(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def restore_sums(self) -> None:
        """Puts back what was summed but not logged when the checkpoint was made, and cuts the log to its step."""
        log = self.folder / "log.jsonl"
        if self.args.should_save:
            lines = (json.dumps(entry, sort_keys=True) + "\n" for entry in self.state.log_history if "loss" in entry)
            log.write_text("".join(lines), encoding="utf-8")
        if self._resumed_from is None:
            return
        saved = checkpoint.load_sums(self._resumed_from)
        self._tr_loss = torch.tensor(saved["tr_loss"], device=self.args.device)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self.sums = torch.tensor(saved["sums"], dtype=torch.float64)
        self.items = torch.tensor(saved["items"], dtype=torch.float64)


def mixed_precision(config: TrainConfig, weight: Tensor) -> bool:
    """Tells whether float32 weights run in bfloat16: on a GPU that has it, unless a dtype was asked for."""
    gpu = weight.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return gpu and config.dtype == "auto" and weight.dtype == torch.float32


def precision(config: TrainConfig, weight: Tensor) -> str:
    """Returns how a run computes, for its identity: a run begun in one precision does not go on in another."""
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{dtype} in bfloat16" if mixed_precision(config, weight) else dtype


def _arguments(config: TrainConfig, folder: Path, steps: int, *, autocast: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        warmup_steps=math.ceil(config.warmup * steps),
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
        use_cpu=config.device == "cpu",
        bf16=autocast,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    # Several GPUs in one process would mean nn.DataParallel, which splits batches that are no single tensors.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def steps_for(config: TrainConfig, batches: float) -> int:
    """Returns the optimizer steps of a run: as configured, or what its batches come to, rounded up."""
    return config.steps or max(math.ceil(batches / config.accumulation), 1)


def require_one_process(job: str) -> None:
    """Refuses a start by torchrun: work folder and in-batch negatives are those of one process for now.

    Raises:
        ConfigError: Several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{job} runs in one process for now; start it without torchrun or accelerate launch")
