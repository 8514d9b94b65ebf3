"""transformers.Trainer, with batches that are a function of their number, exact resume, and losses that are sums.

Trainer brings the optimizer, the schedules, mixed precision, distributed training and the logging integrations. What is
replaced: its checkpoints (see checkpoint.py), its sampling (a batch is recomputed from seed and number, so a resumed
run sees what it would have seen), and its loss averaging (a sum over examples divided by their number over all passes,
accumulation steps and processes).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, set_seed

from llara.config import TrainConfig
from llara.errors import ConfigError, LlaraError
from llara.hardware import is_out_of_memory, keep_freed_memory
from llara.progress import note
from llara.training import checkpoint
from llara.training.arguments import mixed_precision, shards, training_arguments
from llara.training.faults import not_finite, out_of_memory
from llara.training.integrations import off_network
from llara.training.layers import prepare_layers, release_layers
from llara.training.parallel import Ranks, unreached
from llara.training.prefetch import Prefetch
from llara.training.saving import SavingTrainer
from llara.training.sharding import close, is_sharded, layer_names, whole
from llara.training.watch import VOLATILE, LogFile, Meter, Tally, Watcher, means, together

Batch = dict[str, Any]
Measure = Callable[[], dict[str, float]]


class Source(Protocol):
    """Where batches come from. A `Batch` is one forward pass: tensors by name, and

    `counts` (int64 [len(names)], how many examples each sum is over), `tokens` and `cells` (ints: real tokens, prompts
    included, and padded size).

    Batches are made in a thread of their own, so a source draws no global random numbers.
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

    # The name under which accelerate looks for the classes of a model's layers, which it then shards one by one.
    _no_split_modules: list[str]

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the scalar loss and float [len(names)], the detached sums behind it."""
        raise NotImplementedError

    def prepare(self, passes: Sequence[Batch], model: nn.Module) -> None:
        """Called with all passes of a batch before the first goes forward, for losses that compare across passes.

        Args:
            passes: The batch.
            model: This module, as it is wrapped for mixed precision and several processes.
        """


class JobTrainer(SavingTrainer):
    """Runs one training job inside its work folder.

    Args:
        module: The model with its objective.
        source: Where batches come from.
        config: The job's configuration.
        folder: The work folder.
        steps: Optimizer steps of the run.
        label: What the progress line calls the run.
        ranks: This process among those of the run.
        measure: Measures the model on held-out text, every `config.measure_every` steps and at the last; its values go
            into the log. Called in evaluation mode, without gradients, in every process.
    """

    loss_is_scaled_for_ga = True  # losses are divided by the count over all accumulation steps

    def __init__(
        self,
        module: TrainModule,
        source: Source,
        config: TrainConfig,
        folder: Path,
        steps: int,
        label: str,
        ranks: Ranks | None = None,
        measure: Measure | None = None,
    ) -> None:
        self.source, self.config, self.folder, self.total_steps = source, config, folder, steps
        self.ranks, self.measure = ranks or Ranks(), measure
        self.tally, self.meter, self.log_file = Tally(source.names), Meter(), LogFile(folder / "log.jsonl")
        self.resumed_from: Path | None = None
        self._prefetch: Prefetch[list[Batch]] | None = None
        self._step: list[tuple[int, Tensor, Tensor]] = []
        # Made now: a source is asked by one thread at a time.
        self._empty = source.empty() if self.ranks.world > 1 or source.batches is not None else None
        if not any(weight.requires_grad for weight in module.parameters()):
            raise ConfigError("--lora-modules: names no layer that this job reads; fine-tuning reads no LM head")
        weight = next(module.parameters())
        module._no_split_modules = layer_names(module)
        prepare_layers(module, config)
        arguments = training_arguments(
            config,
            folder,
            steps,
            autocast=mixed_precision(config, weight),
            find_unused=not shards() and self._finds_unused(module, weight.device),
        )
        super().__init__(model=module, args=arguments)
        assert self.args.world_size == self.ranks.world, "every process of the run has joined"
        set_seed(config.seed + self.ranks.rank)  # dropout differs from process to process
        self.remove_callback(PrinterCallback)  # it prints to stdout, which belongs to data
        self.remove_callback(ProgressCallback)
        self.watcher = Watcher(self, label)
        self.add_callback(self.watcher)

    def _finds_unused(self, module: TrainModule, device: torch.device) -> bool:
        if self._empty is None or self.ranks.world == 1:
            return False
        empty = to_device(self._empty, device)
        return bool(unreached(module, empty, empty["counts"]))

    def run(self) -> dict[str, float]:
        """Trains to the end, from the newest checkpoint if there is one, and returns the last logged values.

        Raises:
            LlaraError: A loss or gradient that is no number, or memory that has run out.
            StorageError: A checkpoint is damaged or cannot be written.
        """
        self.resumed_from = self.ranks.ask(self._newest_checkpoint)
        if self.resumed_from is not None:
            note(f"resuming from {self.resumed_from.name}")
        on_cpu = next(self.module.parameters()).device.type == "cpu"
        failure: BaseException | None = None
        try:
            with keep_freed_memory(on_cpu), off_network(self.config):
                self.train(resume_from_checkpoint=str(self.resumed_from) if self.resumed_from else None)
        except BaseException as error:
            failure = error
            if is_out_of_memory(error):
                raise LlaraError(out_of_memory(self.config, self.state.global_step + 1, error)) from error
            raise
        finally:
            self._stop_reading()
            release_layers(self.module)
            self.watcher.close(failure)
        logged = [entry for entry in self.state.log_history if "loss" in entry]
        last = logged[-1] if logged else {}
        return {key: value for key, value in last.items() if isinstance(value, float) and key not in VOLATILE}

    def _newest_checkpoint(self) -> Path | None:
        found = checkpoint.list_checkpoints(self.folder)
        if not found:
            return None
        checkpoint.check_checkpoint(found[-1])
        return found[-1]

    # Batches ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[int]:
        """Returns the places of this rank's batches, in order; a resumed run skips those that it has seen."""
        places: Any = range(self.total_steps * self.args.gradient_accumulation_steps)
        return DataLoader(places, batch_size=1, shuffle=False, collate_fn=_only)

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Returns the batches of one optimizer step and what they count together, over all ranks."""
        places = [next(epoch_iterator) for _ in range(num_batches)]
        if self._prefetch is None:
            ahead = range(places[0], self.total_steps * self.args.gradient_accumulation_steps)
            self._prefetch = Prefetch(self._read, ahead).__enter__()
        batches: list[Batch] = []
        for place in places:
            batches.append({"number": self._number(place), "passes": self._prefetch.take(place)})
        self._even_out([batch["passes"] for batch in batches])
        self._step.clear()
        passes: list[Batch] = [each for batch in batches for each in batch["passes"]]
        self.tally.see(passes)
        self.meter.tokens += sum(each["tokens"] for each in passes)
        counts = torch.stack([each["counts"] for each in passes]).sum(dim=0).to(device)
        if self.ranks.world > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    def _number(self, place: int) -> int:
        """Returns the number, in the whole run, of this rank's batch at a place: a step's batches are neighbours."""
        return place * self.ranks.world + self.ranks.rank

    def _read(self, place: int) -> list[Batch]:
        number, batches = self._number(place), self.source.batches
        if batches is None or number < batches:
            return self.source.passes(number)
        assert self._empty is not None
        return [self._empty]

    def _even_out(self, batches: list[list[Batch]]) -> None:
        """Gives all ranks the same number of passes where each pass gathers weights from all of them."""
        if self.ranks.world == 1 or not is_sharded(self.module):
            return
        assert self._empty is not None
        numbers = self.ranks.gather([len(passes) for passes in batches])
        for passes, *most in zip(batches, *numbers, strict=True):
            passes.extend([self._empty] * (max(most) - len(passes)))

    def _stop_reading(self) -> None:
        if self._prefetch is not None:
            self._prefetch.__exit__()

    # Steps ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Runs the passes of one batch forward and backward, and returns its share of the step's loss."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        passes = [to_device(batch, self.args.device) for batch in inputs["passes"]]
        assert isinstance(self.module, TrainModule)
        with self.accelerator.no_sync(model=model):
            self.module.prepare(passes, model)
        for place, batch in enumerate(passes, start=1):
            # Ranks exchange gradients once, in the last pass of a step; sharded ones as they come.
            exchange = (place == len(passes) and self.accelerator.sync_gradients) or is_sharded(model)
            with contextlib.nullcontext() if exchange else self.accelerator.no_sync(model=model):
                loss, sums = model(batch, num_items_in_batch)
                # Distributed training averages gradients over ranks, hence the factor.
                self.accelerator.backward(loss * self.ranks.world)
            self._step.append((inputs["number"], loss.detach(), sums))
            total += loss.detach() * self.ranks.world
        return total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Called between the backward pass and the optimizer's step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        norm = whole(torch.as_tensor(norm)).detach()
        self._require_finite(norm)
        for sums in torch.stack([sums for _, _, sums in self._step]).cpu().double():
            self.tally.sums += sums
        return norm

    def _require_finite(self, norm: Tensor) -> None:
        """Stops every rank before the optimizer moves, where a loss or the gradient is no number in one of them."""
        losses = torch.stack([loss for _, loss, _ in self._step])
        bad = torch.stack([~torch.isfinite(losses).all(), ~torch.isfinite(norm)]).float()
        if self.ranks.world > 1:
            bad = self.accelerator.reduce(bad, "sum")
        bad_loss, bad_norm = bad.tolist()
        if not bad_loss and not bad_norm:
            return
        self._stop_reading()  # a source is asked by one thread at a time
        values = [(number, float(loss)) for number, loss, _ in self._step]
        numbers = [number for number, loss in values if not bad_loss or not _finite(loss)]
        here = [each for number in dict.fromkeys(numbers) for each in self._describe(number)]
        found = self.ranks.gather(([loss for _, loss in values if not _finite(loss)], here))
        worst = [loss for losses_there, _ in found for loss in losses_there]
        what = f"loss is {worst[0]}" if worst else f"gradient's norm is {float(norm)}"
        saved = checkpoint.list_checkpoints(self.folder)
        documents = list(dict.fromkeys(each for _, there in found for each in there))
        step, left = self.state.global_step + 1, str(saved[-1]) if saved else None
        raise LlaraError(self.ranks.ask(lambda: not_finite(self.folder, what, step, documents, left)))

    def _describe(self, number: int) -> list[str]:
        known = self.source.batches is None or number < self.source.batches
        return self.source.describe(number) if known else []

    # Log --------------------------------------------------------------------------------------------------------

    def measures_now(self) -> bool:
        """Tells whether the step that has just ended is one to measure after."""
        step = self.state.global_step
        due = step % self.config.measure_every == 0 or step >= self.state.max_steps
        return self.measure is not None and due

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a log entry what was summed and measured, and writes it to log.jsonl."""
        if "loss" in logs:
            logs.update(self._watched())
        # To Trainer the whole run is one epoch, whatever the job's configuration calls one.
        epoch, self.state.epoch = self.state.epoch, None  # type: ignore[assignment]
        super().log(logs, start_time)
        self.state.epoch = epoch
        if "loss" in logs and self.args.should_save:
            self.log_file.add(self.state.log_history[-1])

    def _watched(self) -> dict[str, float]:
        waited = self._prefetch.waited if self._prefetch is not None else 0.0
        found = self.ranks.gather((self.tally.state(), self.meter.values(waited)))
        values = means(self.tally.names, [tally for tally, _ in found]) | together([meter for _, meter in found])
        self.tally.reset()
        if self.measure is not None and self.measures_now():
            self.module.eval()
            with torch.no_grad(), self.accelerator.autocast():
                # Of the first process everywhere: what they choose and when they stop must not differ in a last digit.
                values |= self.ranks.gather(self.measure())[0]
            close(self.module)
        self.meter.look(waited)
        return values


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns a pass with its tensors on a device; rows that are no tensors yet stay as they are."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _finite(value: float) -> bool:
    return value - value == 0.0


def _only(places: Sequence[int]) -> int:
    return places[0]
