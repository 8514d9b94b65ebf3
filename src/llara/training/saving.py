"""Trainer's checkpoints, replaced: staged and renamed (see checkpoint.py), whole also where the model is sharded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from llara.config import TrainConfig
from llara.errors import StorageError
from llara.publishing import write_errors
from llara.training import checkpoint
from llara.training.parallel import Ranks
from llara.training.sharding import is_sharded, open_methods, optimizer_state, put_optimizer_state
from llara.training.watch import LogFile, Meter, Tally


class SavingTrainer(Trainer):
    """The part of `JobTrainer` that saves and resumes."""

    config: TrainConfig
    folder: Path
    ranks: Ranks
    tally: Tally
    meter: Meter
    log_file: LogFile
    resumed_from: Path | None

    @property
    def module(self) -> nn.Module:
        """The model with its objective: sharded where the run is, never inside another wrapper."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        staging = self.folder / ".tmp-staging"
        if self.args.should_save:
            checkpoint.clear_leftovers(self.folder)  # what a killed run staged would be taken for part of this one
            staging.mkdir()
        self.ranks.wait()
        final, self.args.output_dir = self.args.output_dir, str(staging)
        try:
            with write_errors(staging):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = final
        unlogged = self.ranks.gather({"tr_loss": float(self._tr_loss), **self.tally.state()})
        if self.args.should_save:
            staged = staging / f"checkpoint-{self.state.global_step}"
            run = {"total_loss": self._total_loss_scalar, "last_logged": self._globalstep_last_logged}
            checkpoint.save_sums(staged, {**run, "ranks": unlogged})
            checkpoint.publish_checkpoint(staged, self.folder, self.config.keep)
        self.ranks.wait()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights that training changes; called by Trainer for a checkpoint."""
        assert output_dir is not None
        checkpoint.save_weights(self.accelerator.unwrap_model(self.module), Path(output_dir), write=self.ranks.first)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.module):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(self.module, self._plain_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self._schedule().state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.module):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        put_optimizer_state(self.module, self._plain_optimizer(), state)
        self._schedule().load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_weights(self.accelerator.unwrap_model(self.module), Path(resume_from_checkpoint))

    def restore(self) -> None:
        """Puts back what was summed but not logged when the checkpoint was made, and cuts the log to its step."""
        if self.args.should_save:
            self.log_file.begin(self.state.log_history)
        self.meter.look(0.0)
        open_methods(self.module, "recall")
        if self.resumed_from is None:
            return
        saved = checkpoint.load_sums(self.resumed_from)
        if len(saved["ranks"]) != self.ranks.world:
            was = f"was written by {len(saved['ranks'])} processes, and there are {self.ranks.world} now"
            raise StorageError(self.resumed_from, f"{was}; start as many")
        mine = saved["ranks"][self.ranks.rank]
        self._tr_loss = torch.tensor(mine["tr_loss"], device=self.args.device)
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]
        self.tally.restore(mine)

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it

    def _schedule(self) -> Any:
        return self.lr_scheduler
