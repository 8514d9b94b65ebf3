"""Checkpoints, accumulation, logs, and what stops a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llara.config import AdaptConfig
from llara.errors import LlaraError, StorageError
from llara.training import checkpoint, faults
from llara.training.arguments import steps_for
from llara.training.objective import NAMES
from llara.training.trainer import JobTrainer
from tests.training.helpers import adapt_config, computed, log_lines
from tests.training.rows import INF, NAN, Rows, gradients_of, make_trainer, weights_of


def gradients_of_first_step(folder: Path, **changes: Any) -> torch.Tensor:
    """Returns the gradient as the optimizer sees it at step 1."""
    return gradients_of(make_trainer(folder, steps=1, max_grad_norm=0.0, **changes)[0])[0]


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    whole = gradients_of_first_step(tmp_path / "whole", batch_size=8)
    halves = gradients_of_first_step(tmp_path / "halves", batch_size=4, accumulation=2)
    singles = gradients_of_first_step(tmp_path / "singles", batch_size=1, accumulation=8)
    passes = gradients_of_first_step(tmp_path / "passes", batch_size=8, cut=3)
    both = gradients_of_first_step(tmp_path / "both", batch_size=4, cut=3, accumulation=2)
    for other in (halves, singles, passes, both):
        assert float((whole - other).norm() / whole.norm()) < 1e-6


def test_accumulation_gives_the_same_run(tmp_path: Path) -> None:
    whole, _ = make_trainer(tmp_path / "whole", batch_size=8, log_every=1)
    halves, _ = make_trainer(tmp_path / "halves", batch_size=4, accumulation=2, log_every=1)
    whole.run()
    halves.run()
    # Adam divides by the gradient's size, so rounding shows more in weights than in gradients.
    torch.testing.assert_close(weights_of(whole), weights_of(halves), rtol=1e-3, atol=1e-4)
    logs = [log_lines(tmp_path / name, "log.jsonl") for name in ("whole", "halves")]
    for left, right in zip(*logs, strict=True):
        assert {k: left[k] for k in left if "loss" in k} == pytest.approx({k: right[k] for k in right if "loss" in k})


def test_the_log_holds_the_mean_of_each_branch(tmp_path: Path) -> None:
    trainer, source = make_trainer(tmp_path / "run", steps=3, learning_rate=0.0, log_every=3, accumulation=2, cut=3)
    last = trainer.run()
    totals, counts, per_step = torch.zeros(3), torch.zeros(3, dtype=torch.float64), []
    for step in range(3):
        batches = [batch for number in (2 * step, 2 * step + 1) for batch in source.passes(number)]
        together = torch.stack([batch["counts"] for batch in batches]).sum(dim=0)
        with torch.no_grad():
            results = [trainer.model(batch, together) for batch in batches]
        per_step.append(float(sum(loss for loss, _ in results)))
        totals += torch.stack([sums for _, sums in results]).sum(dim=0)
        counts += together
    entry = log_lines(tmp_path / "run", "log.jsonl")[0]
    for name, mean in zip(NAMES, (totals / counts).tolist(), strict=True):
        assert entry[f"loss_{name}"] == pytest.approx(mean, rel=1e-5)
    assert entry["loss"] == pytest.approx(sum(per_step) / 3, rel=1e-5)
    assert entry["loss"] == pytest.approx(last["loss"])


@pytest.mark.parametrize(("steps", "log_every", "logged"), [(5, 2, [2, 4, 5]), (2, 10, [2]), (4, 4, [4])])
def test_the_last_steps_are_logged_too(tmp_path: Path, steps: int, log_every: int, logged: list[int]) -> None:
    trainer, _ = make_trainer(tmp_path / "run", steps=steps, log_every=log_every)
    last = trainer.run()
    lines = log_lines(tmp_path / "run", "log.jsonl")
    assert [line["step"] for line in lines] == logged
    assert last["loss"] == lines[-1]["loss"]


def test_log_lines_cover_their_own_steps(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "run", steps=4, learning_rate=0.0, log_every=1, batch_size=24)
    trainer.run()
    losses = [entry["loss_ebae"] for entry in log_lines(tmp_path / "run", "log.jsonl")]
    assert len(losses) == 4
    assert losses == pytest.approx([losses[0]] * 4)  # every step sees all rows; nothing of the last is carried over


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("number", [0, 3, 4, 7, 9, 10, 12, 15, 17, 18])  # one batch of each of ten steps
def test_what_is_no_number_stops_before_the_optimizer_moves(
    tmp_path: Path, where: str, value: float, number: int
) -> None:
    settings: dict[str, Any] = {"steps": 10, "accumulation": 2, "cut": 3, "save_every": 1, "log_every": 1}
    settings["max_grad_norm"] = 0.0 if number in (3, 12) else 1.0
    trainer, _ = make_trainer(tmp_path / "run", bad={number: (where, value)}, **settings)
    step = number // 2 + 1
    with pytest.raises(LlaraError) as caught:
        trainer.run()
    said = str(caught.value)
    assert said.startswith("the loss is " if where == "loss" else "the gradient's norm is ")
    assert f" at step {step}; nothing was updated with it" in said
    # A bad loss is that of one batch of four rows; a bad gradient is that of the step.
    rows = range(number * 4, number * 4 + 4) if where == "loss" else range((step - 1) * 8, step * 8)
    assert said.endswith("the documents of that step: " + ", ".join(f"row {row % 24}" for row in rows))
    before = weights_of(trainer)
    assert torch.isfinite(before).all()
    lines = log_lines(tmp_path / "run", "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, step))
    assert all(np.isfinite(line["loss"]) for line in lines)
    saved = checkpoint.list_checkpoints(tmp_path / "run")
    if step == 1:
        assert "there is no checkpoint yet" in said and not saved
        assert torch.equal(before, weights_of(make_trainer(tmp_path / "healthy", **settings)[0]))
    else:
        assert f"the last good checkpoint is {saved[-1]}" in said
        assert saved[-1].name == f"checkpoint-{step - 1}"
        checkpoint.load_weights(trainer.model, saved[-1])
        assert torch.equal(weights_of(trainer), before)


def test_a_message_names_few_of_many_documents(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "run", bad={0: ("loss", NAN)}, batch_size=20)
    with pytest.raises(LlaraError, match=r"step: row 0, row 1, .*row 7 and 12 more, all listed in .*bad_step\.json$"):
        trainer.run()
    listed = json.loads((tmp_path / "run" / "bad_step.json").read_text())
    assert listed == {"what": "loss is nan", "step": 1, "documents": [f"row {number}" for number in range(20)]}


def test_a_message_is_not_lost_where_its_list_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise StorageError(path, "the disk is full")

    monkeypatch.setattr(faults, "write_json_atomic", full)
    trainer, _ = make_trainer(tmp_path / "run", bad={0: ("loss", NAN)}, batch_size=20)
    with pytest.raises(LlaraError, match=r"the loss is nan at step 1; .* could not be listed \(.*is full\)$"):
        trainer.run()


def resumed(folder: Path, stop: int, **changes: Any) -> tuple[JobTrainer, Rows]:
    """Runs until step `stop` + 1 fails, and returns a trainer that goes on after `stop`."""
    broken, _ = make_trainer(folder, steps=6, bad={stop: ("loss", NAN)}, save_every=stop, **changes)
    with pytest.raises(LlaraError, match="the loss is nan"):
        broken.run()
    return make_trainer(folder, steps=6, **changes)


def test_a_resumed_run_asks_for_the_batches_that_follow(tmp_path: Path) -> None:
    trainer, source = resumed(tmp_path / "run", 4)
    trainer.run()
    assert source.asked == [4, 5]
    reference, _ = make_trainer(tmp_path / "reference", steps=6)
    reference.run()
    assert torch.equal(weights_of(trainer), weights_of(reference))
    assert computed(tmp_path / "run", "log.jsonl") == computed(tmp_path / "reference", "log.jsonl")


def test_intervals_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    trainer, _ = resumed(tmp_path / "run", 2, log_every=2)
    again, _ = make_trainer(tmp_path / "run", steps=6, log_every=1, save_every=1, keep=10)
    again.run()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == [
        f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)
    ]
    assert [entry["step"] for entry in log_lines(tmp_path / "run", "log.jsonl")] == [2, 3, 4, 5, 6]
    del trainer


def test_checkpoints_hold_no_pickled_arguments_and_the_oldest_go(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "run", steps=6, save_every=2, keep=2)
    trainer.run()
    found = checkpoint.list_checkpoints(tmp_path / "run")
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-6"]
    for path in found:
        names = {file.name for file in path.iterdir()}
        assert "training_args.bin" not in names
        assert {"weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sums.json"} <= names
        recorded = json.loads((path / "checkpoint.json").read_text())["files"]
        assert recorded.keys() == names - {"checkpoint.json"}
        checkpoint.check_checkpoint(path)


def test_every_pickle_is_read_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = resumed(tmp_path / "run", 2)
    reads: list[tuple[str, Any]] = []
    original = torch.load

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append((Path(file).name, kwargs.get("weights_only")))
        return original(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    trainer.run()
    assert {name for name, _ in reads} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {weights_only for _, weights_only in reads} == {True}


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sums.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    raw = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw if damage == "flip" else raw[:-1])
    with pytest.raises(StorageError, match=rf"{name}: is (damaged|missing).*delete .*checkpoint-2") as caught:
        checkpoint.check_checkpoint(saved)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"[]", b'{"files": {"sums.json": {"bytes": 1}}}'])
def test_a_damaged_record_is_refused(saved: Path, content: bytes | None) -> None:
    path = saved / "checkpoint.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(StorageError, match=r"checkpoint.json: is (damaged|missing).*delete .*checkpoint-2"):
        checkpoint.check_checkpoint(saved)


@pytest.fixture
def saved(tmp_path: Path, one_checkpoint: dict[str, bytes]) -> Path:
    """A copy of a real checkpoint."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name, raw in one_checkpoint.items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    trainer, _ = make_trainer(folder, steps=2)
    trainer.run()
    return {path.name: path.read_bytes() for path in (folder / "checkpoint-2").iterdir()}


def test_the_run_refuses_a_damaged_checkpoint_until_it_is_deleted(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "run", steps=4, save_every=2)
    trainer.run()
    damaged = tmp_path / "run" / "checkpoint-4"
    (damaged / "sums.json").write_bytes(b"{}")
    again, _ = make_trainer(tmp_path / "run", steps=4, save_every=2)
    with pytest.raises(StorageError, match=r"delete .*checkpoint-4 to resume from the one before it"):
        again.run()
    for path in damaged.iterdir():
        path.unlink()
    damaged.rmdir()
    last, source = make_trainer(tmp_path / "run", steps=4, save_every=2)
    last.run()
    assert source.asked == [2, 3]
    assert torch.equal(weights_of(last), weights_of(trainer))


def test_leftovers_are_no_checkpoints_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in (".tmp-staging/checkpoint-9", ".tmp-checkpoint-1", "checkpoint-x", "checkpoint-"):
        (folder / name).mkdir(parents=True)
        (folder / name / "checkpoint.json").write_text("{}")
    (folder / ".tmp-staging" / "checkpoint-2").mkdir()
    (folder / ".tmp-staging" / "checkpoint-2" / "checkpoint.json").write_text("{}")
    assert checkpoint.list_checkpoints(folder) == []
    trainer, source = make_trainer(folder, steps=2)
    trainer.run()
    assert source.asked == [0, 1]
    checkpoint.check_checkpoint(folder / "checkpoint-2")
    assert "checkpoint.json" not in json.loads((folder / "checkpoint-2" / "checkpoint.json").read_text())["files"]
    assert not (folder / ".tmp-checkpoint-1").exists()
    assert not (folder / ".tmp-staging" / "checkpoint-9").exists()


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    trainer, _ = make_trainer(saved.parent / "other", steps=2)
    next(iter(trainer.model.parameters())).requires_grad_(False)
    with pytest.raises(StorageError, match=r"belongs to another model: lm.model.embed_tokens.weight"):
        checkpoint.load_weights(trainer.model, saved)
    (saved / "weights.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(StorageError, match=r"weights.safetensors: cannot be read"):
        checkpoint.load_weights(trainer.model, saved)


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


def test_steps_come_from_batches_rounded_up() -> None:
    def config(**changes: Any) -> AdaptConfig:
        return adapt_config(Path("b"), Path("c"), Path("o"), **{"steps": None, **changes})

    assert steps_for(config(), 9 / 4) == 3
    assert steps_for(config(), 8) == 8
    assert steps_for(config(accumulation=2), 9 / 4) == 2
    assert steps_for(config(), 0) == 1
    assert steps_for(config(steps=7), 9 / 4) == 7
