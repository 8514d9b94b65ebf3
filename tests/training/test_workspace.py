"""Where a run lives: reuse, refusal, one writer, and a model folder that is whole or not there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llara.config import AdaptConfig
from llara.contract import Contract
from llara.errors import ConfigError, DataError, StorageError
from llara.model import EmbeddingModel
from llara.training import adapt as adapt_module
from llara.training import workspace
from llara.training.workspace import Workspace, finished, identity_of, work_folder
from tests import tiny
from tests.training.helpers import adapt_config, write_lines, write_text


@pytest.fixture
def config(tmp_path: Path) -> AdaptConfig:
    return adapt_config(tmp_path / "base", tmp_path / "text.jsonl", tmp_path / "out")


def identity(config: AdaptConfig, **data: str) -> dict[str, Any]:
    return identity_of(config, "adapt", "f" * 8, Contract(), data or {"corpus": "c" * 8})


def publish(config: AdaptConfig, model: EmbeddingModel) -> None:
    with Workspace(config, identity(config)) as work:
        (work.folder / "log.jsonl").write_text('{"loss": 1.0}\n')
        work.publish(model, 4, {"loss": 1.0})


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    return tiny.model()


def test_a_finished_run_is_found_again(config: AdaptConfig, model: EmbeddingModel) -> None:
    assert finished(config, identity(config)) is None
    publish(config, model)
    assert sorted(path.name for path in config.output.parent.iterdir()) == ["out"]
    found = finished(config, identity(config))
    assert found is not None
    assert (found.output, found.steps, found.log, found.reused) == (config.output, 4, {"loss": 1.0}, True)
    assert (config.output / "training_log.jsonl").read_text() == '{"loss": 1.0}\n'
    assert "chunk_length = 16" in (config.output / "training_config.toml").read_text()


def test_another_configuration_is_refused_with_what_differs(config: AdaptConfig, model: EmbeddingModel) -> None:
    publish(config, model)
    other = replace(config, learning_rate=0.5, lora_rank=8)
    with pytest.raises(StorageError) as caught:
        finished(other, identity(other))
    message = str(caught.value)
    assert "settings.learning_rate was 0.01, is now 0.5" in message
    assert "settings.lora_rank was 0, is now 8" in message
    assert "batch_size" not in message
    with pytest.raises(StorageError, match=r"data.corpus was"):
        finished(config, identity(config, corpus="changed"))


def test_an_unfinished_run_of_another_configuration_is_refused(config: AdaptConfig) -> None:
    with Workspace(config, identity(config)) as work:
        (work.folder / "checkpoint-2").mkdir()
    assert not config.output.exists()
    other = replace(config, seed=7)
    with (
        pytest.raises(StorageError, match=r"out.partial.*settings.seed was 42, is now 7"),
        Workspace(other, identity(other)),
    ):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"report_to": ("tensorboard",)},
        {"log_every": 1},
        {"save_every": 3},
        {"keep": 9},
        {"device": "cpu:0"},
        {"offline": False},
        {"verify": True},
        {"model": "moved/base"},
        {"corpus": (Path("moved.jsonl"),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_change_the_weights_is_no_part_of_the_identity(
    config: AdaptConfig, changes: dict[str, Any]
) -> None:
    assert identity(replace(config, **changes)) == identity(config)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"objective": "lm"}, {"accumulation": 2}])
def test_what_changes_the_weights_is(config: AdaptConfig, changes: dict[str, Any]) -> None:
    assert identity(replace(config, **changes)) != identity(config)


def test_another_contract_is_another_model(config: AdaptConfig) -> None:
    data = {"corpus": "c"}
    plain, with_bos = (identity_of(config, "adapt", "f", Contract(bos=bos), data) for bos in (False, True))
    assert plain != with_bos


def test_a_foreign_output_is_refused(config: AdaptConfig) -> None:
    config.output.mkdir()
    assert finished(config, identity(config)) is None  # an empty folder is the user's to give
    (config.output / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match="was not made by this training stage; choose another --output"):
        finished(config, identity(config))
    assert (config.output / "thesis.tex").read_text() == "years of work"


def test_a_file_in_place_of_the_output_is_refused(config: AdaptConfig) -> None:
    config.output.write_text("a file")
    with pytest.raises(StorageError, match="was not made by this training stage"):
        finished(config, identity(config))


def test_a_foreign_work_folder_is_refused(config: AdaptConfig) -> None:
    work_folder(config).mkdir()
    (work_folder(config) / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="was not made by llara"), Workspace(config, identity(config)):
        pass
    assert (work_folder(config) / "notes.txt").exists()


def test_an_empty_output_folder_is_filled(config: AdaptConfig, model: EmbeddingModel) -> None:
    config.output.mkdir()
    publish(config, model)
    assert (config.output / "llara.json").is_file()


def test_a_second_run_at_the_same_time_is_refused(config: AdaptConfig) -> None:
    with Workspace(config, identity(config)):
        with (
            pytest.raises(StorageError, match=r"is being written by process \d+ on "),
            Workspace(config, identity(config)),
        ):
            pass
        assert work_folder(config).is_dir()
    with Workspace(config, identity(config)):  # the lock ends with its holder
        pass


def test_what_a_killed_publication_left_is_tidied_up(config: AdaptConfig, model: EmbeddingModel) -> None:
    publish(config, model)
    work_folder(config).mkdir()
    (work_folder(config) / "checkpoint-4").mkdir()
    assert finished(config, identity(config)) is not None
    assert not work_folder(config).exists()


def test_curves_outlive_a_kill_before_the_model_has_its_name(
    config: AdaptConfig, model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with Workspace(config, identity(config)) as work:
        (work.folder / "log.jsonl").write_text('{"loss": 1.0}\n')
        (work.folder / "checkpoint-4").mkdir()
        (work.folder / "runs" / "host").mkdir(parents=True)
        (work.folder / "runs" / "host" / "events.1").write_text("first")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(workspace, "publish_folder", killed)
            work.publish(model, 4, {"loss": 1.0})
    with Workspace(config, identity(config)) as work:
        (work.folder / "runs" / "host" / "events.2").write_text("second")
        work.publish(model, 4, {"loss": 1.0})
    shown = {path.name: path.read_text() for path in config.output.glob("runs/host/*")}
    assert shown == {"events.1": "first", "events.2": "second"}


@pytest.mark.parametrize("error", [ConfigError("a setting"), DataError("file", 3, "a row"), KeyboardInterrupt()])
def test_before_the_first_checkpoint_another_configuration_may_begin(config: AdaptConfig, error: BaseException) -> None:
    with pytest.raises(type(error)), Workspace(config, identity(config)) as work:
        (work.folder / "chunks").mkdir()
        raise error
    mended = replace(config, learning_rate=1e-5)
    with Workspace(mended, identity(mended)) as work:
        assert not (work.folder / "chunks").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("disk", "is full"), RuntimeError("ours")])
def test_a_run_that_can_go_on_leaves_its_work(config: AdaptConfig, error: BaseException) -> None:
    with pytest.raises(type(error)), Workspace(config, identity(config)):
        raise error
    assert json.loads((work_folder(config) / "identity.json").read_text())["identity"]["stage"] == "adapt"


def test_checkpoints_outlive_a_mistake(config: AdaptConfig) -> None:
    with pytest.raises(DataError), Workspace(config, identity(config)) as work:
        (work.folder / "checkpoint-2").mkdir()
        raise DataError("file", 3, "a row")
    assert (work_folder(config) / "checkpoint-2").is_dir()


def test_the_same_command_again_trains_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_text(tmp_path / "text.jsonl", documents=4)
    config = adapt_config(base, corpus, tmp_path / "out", steps=1)
    first = adapt_module.adapt(config)
    before = {path.name: path.read_bytes() for path in config.output.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(adapt_module, "JobTrainer", fail)
    again = adapt_module.adapt(replace(config, log_every=7, save_every=1, report_to=("tensorboard",)))
    assert (first.reused, again.reused) == (False, True)
    assert (again.steps, again.log) == (first.steps, first.log)
    assert {path.name: path.read_bytes() for path in config.output.iterdir()} == before
    write_text(corpus, documents=5)
    with pytest.raises(StorageError, match=r"data.corpus was .* is now"):
        adapt_module.adapt(config)


def test_a_mended_corpus_is_taken(base: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "text.jsonl"
    corpus.write_text('{"_id": "1", "text": \n')
    config = adapt_config(base, corpus, tmp_path / "out", steps=1)
    with pytest.raises(DataError, match=r"text.jsonl:1: "):
        adapt_module.adapt(config)
    write_lines(corpus, [{"_id": "1", "text": "sky"}])
    with pytest.raises(DataError, match="lower --min-chunk-length"):
        adapt_module.adapt(config)
    assert adapt_module.adapt(replace(config, min_chunk_length=1)).output.is_dir()
