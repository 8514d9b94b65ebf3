"""Where a training run lives until it is done, and how it becomes a model folder.

A run with `--output DIR` works in `DIR.partial` beside it: its identity, its configuration, prepared data, checkpoints
and log. The finished model is staged there and becomes `DIR` in one rename, so that `DIR` is never half a model.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llara.config import TrainConfig, to_plain
from llara.contract import FILE_NAME, Storable
from llara.errors import StorageError
from llara.files import (
    IDENTITY,
    LOCK,
    FolderLock,
    claim_output,
    disk_errors,
    json_bytes,
    publish_folder,
    read_json,
    refuse_differences,
    save_config,
)
from llara.model import EmbeddingModel
from llara.reranker import Reranker
from llara.training.checkpoint import list_checkpoints
from llara.training.parallel import Ranks

RECORD = "training.json"
CURVES = "runs"  # what transformers calls the folder of TensorBoard's files
# Settings that do not decide the weights, and paths whose content is fingerprinted: a moved corpus is the same corpus.
INCIDENTAL = {
    *("output", "offline", "verify", "device", "save_every", "keep", "log_every", "report_to", "trust_remote_code"),
    *("model", "corpus", "train", "queries", "dev", "template", "bos", "token_budget", "graph_budget", "measure_every"),
    *("gradient_checkpointing", "compile", "packing"),
}


@dataclass(frozen=True)
class TrainResult:
    """What a training job made: the model folder, optimizer steps, last logged values, whether it was there before."""

    output: Path
    steps: int
    log: Mapping[str, float]
    reused: bool = False


def identity_of(
    config: TrainConfig,
    stage: str,
    base_fingerprint: str,
    contract: Storable,
    data: Mapping[str, str],
    precision: str = "float32",
    processes: int = 1,
) -> dict[str, Any]:
    """Returns the JSON values that decide the trained weights; `contract` is that of the model to be made.

    Processes share a step's batches, and draw their own dropout, so their number is one of them.
    """
    settings = {key: value for key, value in to_plain(config).items() if key not in INCIDENTAL}
    return {
        "stage": stage,
        "settings": settings,
        "base": base_fingerprint,
        "contract": contract.to_dict(),
        "data": dict(data),
        "precision": precision,
        "processes": processes,
    }


def finished(config: TrainConfig, identity: Mapping[str, Any]) -> TrainResult | None:
    """Returns the result of an earlier run with the same identity, or None where there is none yet.

    Raises:
        StorageError: The output folder holds something else.
    """
    folder = config.output
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    record = folder / RECORD
    if not record.is_file() or not (folder / FILE_NAME).is_file():
        raise StorageError(folder, "exists and was not made by this training stage; choose another --output")
    found = read_json(record)
    refuse_differences(folder, found["identity"], json.loads(json.dumps(identity)))
    leftover = work_folder(config)
    if leftover.exists():  # killed between giving the model its name and tidying up
        shutil.rmtree(leftover)
    return TrainResult(folder, found["steps"], found["log"], reused=True)


def work_folder(config: TrainConfig) -> Path:
    """Returns where a run works until its model is done."""
    return config.output.with_name(config.output.name + ".partial")


class Workspace:
    """The `.partial` folder of one run, locked for this process; a context manager.

    Of several processes the first one locks, writes and publishes; what it cannot do is an error in all of them.
    """

    def __init__(self, config: TrainConfig, identity: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        self.config, self.identity, self.ranks = config, identity, ranks or Ranks()
        self.folder = work_folder(config)
        self._lock = FolderLock(self.folder)

    def __enter__(self) -> "Workspace":
        self.ranks.ask(self._open)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.ranks.first:
            self._lock.__exit__(*error)

    def _open(self) -> None:
        self._lock.__enter__()
        try:
            self._forget_beginnings()
            if claim_output(self.folder, self.identity, f"unfinished training ({self.identity['stage']})"):
                self._take_back_curves()
            save_config(self.folder, self.config)
        except BaseException:
            self._lock.__exit__()
            raise

    def _forget_beginnings(self) -> None:
        """Empties a folder in which another configuration began and saved no step: a mended run must not be refused.

        Mended input, a lower learning rate after a loss that was not a number, a second thought: all have another
        identity, and nothing of worth lies here before the first checkpoint.
        """
        record = self.folder / IDENTITY
        if not record.is_file() or list_checkpoints(self.folder):
            return
        if read_json(record).get("identity") != json.loads(json.dumps(self.identity)):
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != LOCK:
                    entry.unlink()

    def _take_back_curves(self) -> None:
        """Puts back what TensorBoard shows, where a run was killed after moving it into a model that got no name."""
        moved = self.folder / "model" / CURVES
        if moved.is_dir() and not (self.folder / CURVES).exists():
            with disk_errors(self.folder):
                moved.rename(self.folder / CURVES)

    def publish(self, model: EmbeddingModel | Reranker, steps: int, log: Mapping[str, float]) -> TrainResult:
        """Saves the model with its settings and log, gives it its final name, and removes the work folder."""
        return self.ranks.ask(lambda: self._publish(model, steps, log))

    def _publish(self, model: EmbeddingModel | Reranker, steps: int, log: Mapping[str, float]) -> TrainResult:
        staged = self.folder / "model"
        if staged.exists():
            shutil.rmtree(staged)
        record = {"identity": self.identity, "steps": steps, "log": dict(log)}
        extra = {
            RECORD: json_bytes(record).decode(),
            "training_config.toml": (self.folder / "config.toml").read_text(encoding="utf-8"),
            "training_log.jsonl": (self.folder / "log.jsonl").read_text(encoding="utf-8"),
        }
        model.save(staged, extra)
        if (self.folder / CURVES).is_dir():  # what TensorBoard shows outlives the work folder
            (self.folder / CURVES).rename(staged / CURVES)
        publish_folder(staged, self.config.output)
        shutil.rmtree(self.folder)
        return TrainResult(self.config.output, steps, log)
