"""What a run shows: speed, waiting, padding, memory and recall, in the log and what it reports to; a lack of memory."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llara.config import ModelConfig
from llara.errors import ConfigError, LlaraError
from llara.hardware import is_out_of_memory
from llara.loading import load_model
from llara.training import watch
from llara.training.adapt import adapt
from llara.training.checkpoint import list_checkpoints
from llara.training.finetune import finetune
from llara.training.integrations import check_integrations, off_network
from llara.training.objective import AdaptModule
from llara.training.watch import VOLATILE, Meter, Tally, means, peak_memory, together
from tests.training.helpers import adapt_config, computed, finetune_config, log_lines, write_lines, write_text
from tests.training.rows import make_trainer, weights_of


def test_the_log_shows_speed_waiting_memory_and_padding(tmp_path: Path) -> None:
    trainer, source = make_trainer(tmp_path / "run", steps=4, log_every=2, accumulation=2, cut=3)
    last = trainer.run()
    lines = log_lines(tmp_path / "run", "log.jsonl")
    assert len(lines) == 2
    for number, line in enumerate(lines):
        passes = [each for batch in range(4 * number, 4 * number + 4) for each in source.passes(batch)]
        padding = 1 - sum(each["tokens"] for each in passes) / sum(each["cells"] for each in passes)
        assert line["padding"] == pytest.approx(padding)
        assert 0 < padding < 1
        assert line["tokens_per_second"] > 0
        assert 0 <= line["wait"] <= 1
        assert 0 < line["memory_gb"] < 1000
        assert "epoch" not in line, "Trainer takes the whole run for one"
    assert set(VOLATILE) == {"tokens_per_second", "wait", "memory_gb"}
    assert last.keys() == {key for key, value in lines[-1].items() if isinstance(value, float)} - set(VOLATILE)


def test_speed_and_waiting_are_shares_of_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 14.0, 18.0])
    monkeypatch.setattr(watch.time, "perf_counter", lambda: next(clock))
    meter = Meter()
    meter.look(1.0)  # at 10 s, a second of which was spent waiting
    meter.tokens = 400
    values = meter.values(waited=2.0)
    assert (values["tokens_per_second"], values["wait"]) == (100.0, 0.25)
    assert meter.values(waited=1.0)["wait"] == 0.0


def test_memory_is_that_of_the_process_in_bytes() -> None:
    before = peak_memory()
    filled = torch.ones(16 * 2**20)
    assert peak_memory() - before < 2 * filled.numel() * 4
    assert peak_memory() >= filled.numel() * 4


def test_means_are_over_all_processes() -> None:
    tallies = []
    for scale in (1, 3):
        tally = Tally(("a", "b"))
        tally.see([{"counts": torch.tensor([2 * scale, 0]), "tokens": 3 * scale, "cells": 4 * scale}] * 2)
        tally.sums += torch.tensor([10.0 * scale, 0.0])
        other = Tally(("a", "b"))
        other.restore(json.loads(json.dumps(tally.state())))
        assert other.state() == tally.state()
        tallies.append(other.state())
    assert means(("a", "b"), tallies) == {"loss_a": 40 / 16, "padding": 0.25}
    tally.reset()
    assert means(("a", "b"), [tally.state()]) == {}


@pytest.mark.parametrize(
    ("every", "log_every", "logged", "measured"),
    [(2, 3, [2, 3, 4, 5], [2, 4, 5]), (100, 2, [2, 4, 5], [5]), (5, 10, [5], [5])],
)
def test_measurements_stand_in_the_log(
    tmp_path: Path, every: int, log_every: int, logged: list[int], measured: list[int]
) -> None:
    seen: list[tuple[bool, bool]] = []

    def measure() -> dict[str, float]:
        assert trainer.model is not None
        seen.append((trainer.model.training, torch.is_grad_enabled()))
        return {"recall_ebae": float(len(seen))}

    trainer, _ = make_trainer(tmp_path / "run", steps=5, measure_every=every, log_every=log_every, measure=measure)
    last = trainer.run()
    lines = log_lines(tmp_path / "run", "log.jsonl")
    assert [line["step"] for line in lines] == logged
    assert [line["step"] for line in lines if "recall_ebae" in line] == measured
    assert [line["recall_ebae"] for line in lines if "recall_ebae" in line] == list(range(1, len(measured) + 1))
    assert last["recall_ebae"] == len(measured)
    assert seen == [(False, False)] * len(measured)


def test_measuring_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    runs = []
    for name, every in (("often", 1), ("once", 100)):
        trainer, source = make_trainer(tmp_path / name, steps=5, measure_every=every, measure=lambda: {})
        held = source.passes(0)
        trainer.measure = lambda trainer=trainer, held=held: {"recall": float(trainer.model.recall(held[0]).sum())}  # type: ignore[misc]
        trainer.run()
        runs.append(weights_of(trainer))
    assert torch.equal(*runs)


def test_adaptation_measures_recall_on_held_out_text(base: Path, tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "text.jsonl", documents=40)
    config = adapt_config(
        base, corpus, tmp_path / "out", steps=30, batch_size=8, log_every=10, measure_every=10, held_out=6
    )
    result = adapt(config)
    lines = log_lines(result.output)
    assert [line["step"] for line in lines if {"recall_ebae", "recall_ebar"} <= line.keys()] == [10, 20, 30]
    assert all(0 <= line[name] <= 1 for line in lines for name in ("recall_ebae", "recall_ebar"))
    assert lines[-1]["recall_ebae"] > lines[0]["recall_ebae"]
    assert result.log["recall_ebae"] == lines[-1]["recall_ebae"]
    again = adapt(adapt_config(base, corpus, tmp_path / "again", **{**_settings(config), "log_every": 10}))
    assert computed(again.output) == computed(result.output)


def _settings(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("steps", "batch_size", "measure_every", "held_out")}


def test_a_bad_step_names_the_documents_of_the_corpus(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_text(tmp_path / "text.jsonl", documents=20)
    forward, seen = AdaptModule.forward, []

    def spoilt(self: AdaptModule, batch: dict[str, Any], counts: torch.Tensor) -> Any:
        seen.append(batch)
        loss, sums = forward(self, batch, counts)
        return (loss * float("nan") if len(seen) == 2 else loss), sums

    monkeypatch.setattr(AdaptModule, "forward", spoilt)
    config = adapt_config(base, corpus, tmp_path / "out", steps=4, batch_size=3, held_out=0)
    with pytest.raises(LlaraError, match="the loss is nan at step 2") as caught:
        adapt(config)
    named = str(caught.value).rpartition("the documents of that step: ")[2].split(", ")
    texts = {row["_id"]: row["text"] for row in log_lines(tmp_path, "text.jsonl")}
    model = load_model(ModelConfig(model=str(base), device="cpu"))
    lengths = seen[1]["text_lengths"].tolist()
    rows = [model.tokenizer.decode(row[1:end]) for row, end in zip(seen[1]["shared"], lengths, strict=True)]
    assert set(named) <= texts.keys()
    assert all(any(row.strip() in texts[name] for name in named) for row in rows)
    assert all(any(row.strip() in texts[name] for row in rows) for name in named)


def test_the_progress_line_shows_what_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = make_trainer(tmp_path / "run", steps=3, log_every=1, measure=lambda: {"recall_ebae": 0.25})
    trainer.run()
    closing = capsys.readouterr().err.splitlines()[-1]
    assert closing.startswith("test: 3 steps, ")
    last = log_lines(tmp_path / "run", "log.jsonl")[-1]
    labels = {"loss": "loss", "ebae": "loss_ebae", "ebar": "loss_ebar", "lm": "loss_lm", "lr": "learning_rate"}
    shown = [f"{label} {last[name]:.4g}" for label, name in labels.items()]
    shown += [f"tokens/s {last['tokens_per_second']:,.0f}", f"padding {last['padding']:.1%}"]
    shown += [f"waiting {last['wait']:.1%}", f"memory {last['memory_gb']:.2f} GB", "recall ebae 0.25"]
    assert ", ".join(shown) in closing


def test_processes_train_together_and_the_one_that_waits_or_holds_most_counts() -> None:
    one = {"tokens_per_second": 90.0, "wait": 0.5, "memory_gb": 1.0}
    other = {"tokens_per_second": 100.0, "wait": 0.1, "memory_gb": 2.0}
    assert together([one, other]) == {"tokens_per_second": 190.0, "wait": 0.5, "memory_gb": 2.0}
    assert together([one]) == one


# Integrations -------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_all_values_also_when_the_run_has_ended(base: Path, corpus: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings: dict[str, Any] = {"steps": 4, "log_every": 2, "report_to": ("tensorboard",)}
    made = adapt(adapt_config(base, corpus, tmp_path / "out", **settings)).output
    (folder,) = {path.parent for path in made.glob("runs/**/events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for line in log_lines(made):
        for name in ("loss", "loss_ebae", "loss_ebar", "learning_rate", "grad_norm", "padding", *VOLATILE):
            assert dict(shown[f"train/{name}"])[line["step"]] == pytest.approx(line[name], rel=1e-6)


@pytest.mark.parametrize("job", ["adapt", "finetune"])
def test_a_missing_integration_is_named_before_anything_starts(
    job: str, base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    train = write_lines(tmp_path / "train.jsonl", [{"query": "q", "pos": ["p"]}])
    with pytest.raises(ConfigError) as caught:
        if job == "adapt":
            adapt(adapt_config(base, corpus, tmp_path / "out", report_to=("trackio", "tensorbord")))
        else:
            finetune(finetune_config(base, train, tmp_path / "out", report_to=("trackio", "tensorbord")))
    assert caught.value.problems == (
        "--report-to: trackio is not installed; install it with: pip install trackio",
        "--report-to: 'tensorbord' is not one of tensorboard, wandb, trackio (did you mean 'tensorboard'?)",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    for names in (("tensorboard",), ()):
        check_integrations(adapt_config(base, corpus, tmp_path / "out", report_to=names))


def test_a_job_without_network_keeps_its_loggers_off_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    paths = Path("base"), Path("corpus"), Path("out")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    check_integrations(adapt_config(*paths, report_to=("trackio",), offline=False))
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID has trackio use the network; unset it"):
        check_integrations(adapt_config(*paths, report_to=("trackio",), offline=True))
    cases = (
        ("online", True, "offline"),
        ("disabled", True, "disabled"),
        ("online", False, "online"),
        (None, True, "offline"),
    )
    for before, offline, meanwhile in cases:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if before is not None:
            monkeypatch.setenv("WANDB_MODE", before)
        with off_network(adapt_config(*paths, offline=offline)):
            assert os.environ["WANDB_MODE"] == meanwhile
        assert os.environ.get("WANDB_MODE") == before


# Memory -------------------------------------------------------------------------------------------------------------

SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12345 bytes."),
]


@pytest.mark.parametrize("error", SAID, ids=["cuda", "linux", "windows"])
@pytest.mark.parametrize("budget", [None, 512])
def test_a_lack_of_memory_names_the_settings_that_help_and_the_run_goes_on(
    tmp_path: Path, error: Exception, budget: int | None
) -> None:
    settings: dict[str, Any] = {"steps": 4, "save_every": 1, "token_budget": budget}
    trainer, _ = make_trainer(tmp_path / "run", **settings)
    forward = trainer.module.forward

    def fail(*args: Any) -> Any:
        if trainer.state.global_step == 2:
            raise error
        return forward(*args)

    trainer.module.forward = fail  # type: ignore[method-assign]
    with pytest.raises(LlaraError) as caught:
        trainer.run()
    said = str(caught.value)
    assert said.startswith(f"out of memory at step 3: {str(error).splitlines()[0]}. Lower --token-budget")
    assert ("--token-budget (now 512), which" in said) == (budget is not None)
    assert "--gradient-checkpointing" in said
    assert "Batch size and learning rate stay as they are" in said
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    again, source = make_trainer(tmp_path / "run", cut=2, **{**settings, "token_budget": 64})
    again.run()
    assert source.asked == [2, 3]


def test_other_errors_are_passed_on_as_they_are(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "run")

    def fail(*args: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.module.forward = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.run()
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(OSError(12, "Cannot allocate memory"))
