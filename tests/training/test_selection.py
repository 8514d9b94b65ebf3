"""The best step by held-out examples is the one that is kept, also by a run that was stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from llara.config import FinetuneConfig
from llara.errors import ConfigError, StorageError
from llara.training import dev as dev_module
from llara.training import finetune as finetune_module
from llara.training.finetune import finetune
from llara.training.selection import best_entry, is_exhausted, run_to_best
from llara.training.trainer import JobTrainer
from tests.training.examples import row
from tests.training.helpers import WORDS, computed, finetune_config, record, sentence, write_lines


def history(*values: float) -> list[dict[str, float]]:
    """Measurements at steps 10, 20, ..., each between two entries without."""
    found: list[dict[str, float]] = []
    for number, value in enumerate(values, start=1):
        found += [{"step": 10 * number - 5, "loss": 1.0}, {"step": 10 * number, "loss": 1.0, "dev_ndcg": value}]
    return [*found, {"step": 10 * len(values) + 5, "loss": 1.0}]


@pytest.mark.parametrize(
    ("values", "best"), [((), None), ((0.0,), 10), ((0.1, 0.3, 0.2), 20), ((0.3, 0.3), 10), ((0.1, 0.2, 0.3), 30)]
)
def test_the_best_is_the_earliest_of_the_highest(values: tuple[float, ...], best: int | None) -> None:
    found = best_entry(history(*values))
    assert (found and found["step"]) == best


@pytest.mark.parametrize(
    ("values", "patience", "over"),
    [
        ((), 1, False),
        ((0.1,), 1, False),
        ((0.2, 0.1), 1, True),
        ((0.2, 0.2), 1, True),
        ((0.2, 0.1), 2, False),
        ((0.2, 0.1, 0.15), 2, True),
        ((0.2, 0.1, 0.3), 1, False),
        ((0.2, 0.1, 0.1, 0.1), 0, False),
    ],
)
def test_patience_runs_out_after_as_many_measurements(values: tuple[float, ...], patience: int, over: bool) -> None:
    assert is_exhausted(history(*values), patience) == over


SCORES = (0.2, 0.5, 0.3, 0.4, 0.1, 0.6)  # at steps 2, 4, ..., 12: what the tests' models are said to reach


@pytest.fixture
def config(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneConfig:
    """A run of 12 steps, measured every second, whose measurements are `SCORES`."""
    rng = np.random.default_rng(0)
    rows = [row(f"{WORDS[i]} {i}", [sentence(rng, 6)]) for i in range(10)]
    train, dev = write_lines(tmp_path / "train.jsonl", rows), write_lines(tmp_path / "dev.jsonl", rows[:4])
    real = dev_module.DevMeasure.__call__
    trainers: list[JobTrainer] = []
    begin = JobTrainer.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        trainers.append(self)

    def scored(self: Any, module: Any) -> dict[str, float]:
        values = real(self, module)
        assert values.keys() == {"dev_loss", "dev_ndcg", "dev_mrr"}
        return {**values, "dev_ndcg": SCORES[trainers[-1].state.global_step // 2 - 1]}

    monkeypatch.setattr(JobTrainer, "__init__", remember)
    monkeypatch.setattr(dev_module.DevMeasure, "__call__", scored)
    changes: dict[str, Any] = {"steps": 12, "measure_every": 2, "log_every": 5, "save_every": 3, "dev": (dev,)}
    return finetune_config(base, train, tmp_path / "out", **changes)


def weights_after(config: FinetuneConfig, steps: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The weights that the same run has after some steps, by stopping it there."""
    step = JobTrainer.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(JobTrainer, "training_step", stop)
        finetune(replace(config, output=folder / "stopped", save_every=steps, dev=(), steps=12))
    return load_file(folder / "stopped.partial" / f"checkpoint-{steps}" / "weights.safetensors")


def test_the_weights_of_the_best_step_are_published(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finetune(replace(config, patience=2))
    # The best of 0.2, 0.5, 0.3, 0.4 is at step 4, and two more were measured.
    assert result.steps == 8
    assert result.log["best_step"] == 4
    assert result.log["dev_ndcg"] == 0.5
    lines = computed(result.output)
    assert [line["step"] for line in lines if "dev_ndcg" in line] == [2, 4, 6, 8]
    expected = weights_after(config, 4, tmp_path, monkeypatch)
    found = load_file(result.output / "model.safetensors")
    for name, value in expected.items():
        assert found[name.removeprefix("lm.")].equal(value)
    assert not list(tmp_path.glob("out.partial"))


def test_without_patience_a_run_goes_to_its_end(config: FinetuneConfig) -> None:
    result = finetune(config)
    assert (result.steps, result.log["best_step"]) == (12, 12)


@pytest.mark.parametrize("killed", [5, 7, 8])
def test_a_run_that_goes_on_chooses_as_one_that_was_never_stopped(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    patient = replace(config, patience=2)
    reference = finetune(patient)
    again = replace(patient, output=tmp_path / "again", save_every=1 if killed == 8 else 3)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    def runs_and_stops(trainer: JobTrainer, patience: int) -> None:
        run_to_best(trainer, patience)
        stop()

    step = JobTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed == 8:  # after its last step, before the model is saved
            patch.setattr(finetune_module, "run_to_best", runs_and_stops)
        else:
            patch.setattr(
                JobTrainer,
                "training_step",
                lambda self, *rest: stop() if self.state.global_step == killed else step(self, *rest),
            )
        finetune(again)
    assert (tmp_path / "again.partial" / "best-4").is_dir()
    resumed = finetune(again)
    assert resumed.log == reference.log
    assert resumed.steps == reference.steps
    assert record(again.output / "model.safetensors") == record(reference.output / "model.safetensors")
    assert computed(again.output) == computed(reference.output)


def test_weights_that_no_checkpoint_calls_the_best_are_removed(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    step = JobTrainer.training_step

    def look(self: Any, *rest: Any) -> Any:
        seen.append(sorted(path.name for path in (tmp_path / "out.partial").glob("best-*")))
        return step(self, *rest)

    monkeypatch.setattr(JobTrainer, "training_step", look)
    finetune(replace(config, keep=1))
    # Measured 2: 0.2, 4: 0.5; saved at 3, 6: only then is step 2 out of reach.
    assert seen[2] == ["best-2"]
    assert seen[4] == seen[5] == ["best-2", "best-4"]
    assert seen[6] == seen[11] == ["best-4"]


def test_what_and_how_often_is_measured_belongs_to_the_run(config: FinetuneConfig) -> None:
    finetune(replace(config, steps=2))
    for change in ({"measure_every": 1}, {"patience": 1}, {"dev": config.train}):
        with pytest.raises(StorageError, match="belongs to another configuration"):
            finetune(replace(config, steps=2, **change))  # type: ignore[arg-type]


def test_patience_needs_something_to_measure_on(config: FinetuneConfig) -> None:
    with pytest.raises(ConfigError, match="--patience: needs --dev"):
        replace(config, dev=(), patience=1)


def test_the_log_names_what_was_measured(config: FinetuneConfig) -> None:
    finetune(replace(config, steps=2))
    line = json.loads((config.output / "training_log.jsonl").read_text().splitlines()[-1])
    assert {"dev_loss", "dev_ndcg", "dev_mrr"} <= line.keys()
