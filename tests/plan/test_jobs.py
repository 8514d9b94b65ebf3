"""Plans beside the jobs that they plan, on a corpus small enough to be its own sample."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llara.cli import main
from llara.cli.parse import parse
from llara.config import EncodeConfig, IndexConfig
from llara.encoding.encode import encode
from llara.errors import ConfigError, DataError, ModelError
from llara.index.build import build_index
from llara.model import EmbeddingModel
from llara.plan import adapt as plan_adapt_module
from llara.plan.config import PlanAdaptConfig, PlanEncodeConfig, PlanIndexConfig
from llara.plan.jobs import plan_adapt, plan_encode, plan_index
from llara.plan.report import Estimate
from llara.training.adapt import adapt
from tests import tiny
from tests.training.helpers import adapt_config, write_text

Config = Callable[..., Any]
SHORT = 0.01  # seconds of calibration: one step, one batch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without its weights."""
    folder = tiny.save_base(tmp_path_factory.mktemp("models") / "shapes")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_text(tmp_path / "corpus.jsonl", documents=40)


def plan_of_adapt(base: Path, corpus: Path, output: Path, **changes: Any) -> PlanAdaptConfig:
    values = vars(adapt_config(base, corpus, output)) | {"calibrate": SHORT} | changes
    return PlanAdaptConfig(**values)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_plan_of_adapt_says_what_adapt_then_does(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"steps": None, "held_out": 4, "save_every": 10, "keep": 1}
    before = names(tmp_path)
    found = plan_adapt(plan_of_adapt(base, corpus, tmp_path / "out", **changes))
    assert names(tmp_path) == before, "nothing is left behind"
    most = 0
    real = plan_adapt_module.prepare  # the module's name for what the job calls, too

    def prepared(*arguments: Any) -> Any:
        store = real(*arguments)
        assert found.amounts["chunks"] == len(store)
        assert found.amounts["chunks with a next text"] == store.chained
        return store

    def watch(*arguments: Any) -> Any:
        nonlocal most
        most = max(most, folder_bytes(tmp_path / "out.partial"))

    monkeypatch.setattr("llara.training.adapt.prepare", prepared)
    monkeypatch.setattr("llara.training.trainer.checkpoint.publish_checkpoint", _after(watch))
    result = adapt(adapt_config(base, corpus, tmp_path / "out", **changes))
    assert found.amounts["steps"] == result.steps
    assert found.disk_after == pytest.approx(folder_bytes(tmp_path / "out"), rel=0.1)
    assert sum(found.disk.values()) == pytest.approx(most, rel=0.1)
    assert found.seconds is not None and found.memory is not None
    assert list(found.seconds) == ["start", "prepare", "train", "measure", "checkpoints", "publish"]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.memory > 2**20


def _after(watch: Callable[..., None]) -> Callable[..., Any]:
    from llara.training import checkpoint

    real = checkpoint.publish_checkpoint

    def published(*arguments: Any) -> Any:
        watch()  # staged, and the one before not yet removed
        return real(*arguments)

    return published


def test_the_next_command_is_the_job_with_the_same_settings(base: Path, corpus: Path, tmp_path: Path) -> None:
    config = plan_of_adapt(base, corpus, tmp_path / "out", lora_rank=2, calibrate=0.0, offline=True)
    words = shlex.split(plan_adapt(config).next_command)
    parsed = parse(words[words.index("adapt") :])
    assert parsed is not None
    assert parsed.config == adapt_config(base, corpus, tmp_path / "out", lora_rank=2)


def test_without_calibration_no_weights_are_needed(shapes: Path, corpus: Path, tmp_path: Path) -> None:
    config = plan_of_adapt(shapes, corpus, tmp_path / "out", calibrate=0.0, fleet="4xL4", lora_rank=2)
    found = plan_adapt(config)
    assert found.seconds is None and found.memory is None
    assert found.amounts["steps"] == 4
    assert found.fleet is not None and found.fleet.fits and found.fleet.seconds > 0
    assert "nothing was run (--calibrate 0)" in found.notes[-1]
    with pytest.raises(ModelError, match=r"holds no .safetensors weights"):
        plan_adapt(plan_of_adapt(shapes, corpus, tmp_path / "out"))


def test_epochs_are_shared_out_among_gpus_and_steps_are_not(shapes: Path, corpus: Path, tmp_path: Path) -> None:
    def seconds(fleet: str, **changes: Any) -> float:
        config = plan_of_adapt(shapes, corpus, tmp_path / "out", calibrate=0.0, fleet=fleet, batch_size=1, **changes)
        found = plan_adapt(config).fleet
        assert found is not None
        return found.seconds

    assert seconds("4xL4", steps=None) == pytest.approx(seconds("L4", steps=None) / 4, rel=0.1)
    assert seconds("4xL4", steps=8) == pytest.approx(seconds("L4", steps=8))


def test_a_model_that_does_not_fit_here_is_not_tried(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llara.plan.measure.memory_bytes", lambda: 1000)
    found = plan_adapt(plan_of_adapt(base, corpus, tmp_path / "out"))
    assert found.seconds is None
    assert found.notes[-1].startswith("nothing was run: it needs more than ")


def test_what_is_missing_here_is_a_warning() -> None:
    found = Estimate(
        job="adapt", corpus="c", amounts={}, hardware="CPU", seconds={"train": 1.0}, memory=2 * 10**9,
        memory_here=10**9, disk={"model": 3 * 10**9}, disk_after=10**9, disk_free=10**9,
    )  # fmt: skip
    assert found.warnings == (
        "needs 2 GB of memory, and 1 GB are here",
        "needs 3 GB of disk, and 1 GB are free there",
    )
    assert "warning: needs 3 GB of disk" in found.to_text()
    assert found.to_json()["warnings"] == found.warnings


def test_encoding_is_tried_as_it_is_done(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With freed memory kept: without it, a calibration found encoding a quarter slower than it then was."""
    keeps, inside = [], []

    @contextmanager
    def kept() -> Iterator[bool]:
        keeps.append(True)
        yield True
        keeps.pop()

    embed = EmbeddingModel.embed

    def looked_at(self: EmbeddingModel, *arguments: Any) -> Any:
        inside.append(bool(keeps))
        return embed(self, *arguments)

    monkeypatch.setattr("llara.plan.encode.keep_freed_memory", kept)
    monkeypatch.setattr(EmbeddingModel, "embed", looked_at)
    config = PlanEncodeConfig(model=str(base), corpus=(corpus,), output=tmp_path / "v", device="cpu", calibrate=SHORT)
    assert plan_encode(config).memory
    assert len(inside) >= 2 and all(inside)


def test_a_plan_of_encode_says_what_encode_then_leaves(base: Path, corpus: Path, tmp_path: Path) -> None:
    with corpus.open("a") as file:
        file.write('{"text": "no id"}\n')
    values: dict[str, Any] = {"model": str(base), "corpus": (corpus,), "output": tmp_path / "vectors", "device": "cpu"}
    found = plan_encode(PlanEncodeConfig(**values, calibrate=SHORT, fleet="2xL4"))
    result = encode(EncodeConfig(**values))
    kept = sum(
        path.stat().st_size
        for path in (tmp_path / "vectors").iterdir()
        if path.name not in ("manifest.json", "config.toml", "rejected.jsonl") and path.suffix != ".json"
    )
    assert found.amounts["documents"] == result.documents + result.rejected
    assert found.disk["vectors"] == (tmp_path / "vectors" / "shard-00000.npy").stat().st_size
    assert found.disk_after == pytest.approx(kept, rel=0.25)
    assert "1 of 41 rows are bad and would be left out" in found.notes
    assert found.seconds is not None and list(found.seconds) == ["start", "read", "encode", "store"]
    assert found.memory is not None and found.fleet is not None
    assert "one worker per GPU" in found.fleet.advice[-1]
    assert "reading and storing is one process's work, however many encode: about " in found.notes[-1]
    both = plan_encode(PlanEncodeConfig(**values, calibrate=SHORT, workers=2))
    assert both.memory is not None and found.memory < both.memory < 3 * found.memory
    assert any(note.startswith("2 workers: time is that of one process") for note in both.notes)
    on_ray = plan_encode(PlanEncodeConfig(**values, calibrate=SHORT, engine="ray", address="head:6379"))
    assert any("and not of the cluster" in note for note in on_ray.notes)
    assert on_ray.next_command.endswith("--engine ray --address head:6379")


def test_a_plan_of_encode_counts_sparse_vectors(base: Path, shapes: Path, corpus: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"corpus": (corpus,), "output": tmp_path / "vectors", "device": "cpu", "sparse": True}
    found = plan_encode(PlanEncodeConfig(model=str(base), **values, calibrate=1.0, fleet="1xL4"))
    encode(EncodeConfig(model=str(base), **values))
    kept = sum(path.stat().st_size for path in (tmp_path / "vectors").glob("*.terms.*"))
    assert found.disk["sparse vectors"] == pytest.approx(kept, abs=1000)
    dense = plan_encode(PlanEncodeConfig(model=str(base), **{**values, "sparse": False}, calibrate=SHORT, fleet="1xL4"))
    assert "sparse vectors" not in dense.disk
    assert found.fleet is not None and dense.fleet is not None
    assert found.fleet.seconds > dense.fleet.seconds
    unknown = plan_encode(PlanEncodeConfig(model=str(shapes), **values, calibrate=0.0))
    assert unknown.disk["sparse vectors"] == 40 * 8 * 129
    assert unknown.notes[-1] == "sparse vectors: at most; fewer terms take less"


def test_encoding_is_planned_without_weights(shapes: Path, corpus: Path) -> None:
    found = plan_encode(PlanEncodeConfig(model=str(shapes), corpus=(corpus,), calibrate=0.0))
    assert found.seconds is None and found.amounts["tokens"] > 0


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq", "rabitq", "sparse", "bm25"])
def test_a_plan_of_index_says_what_index_then_leaves(kind: Any, base: Path, corpus: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(base), "corpus": (corpus,), "device": "cpu", "sparse": kind == "sparse"}
    encode(EncodeConfig(**given, output=tmp_path / "vectors"))
    values: dict[str, Any] = {"vectors": tmp_path / "vectors", "output": tmp_path / "index", "type": kind}
    found = plan_index(PlanIndexConfig(**values))
    assert names(tmp_path) == ["corpus.jsonl", "vectors"], "nothing is left behind"
    result = build_index(IndexConfig(**values))
    assert found.amounts["documents"] == result.documents
    known = 2000  # configuration and identity, which no plan counts
    assert found.disk_after == pytest.approx(result.bytes, abs=known)
    assert found.next_command.endswith(
        f"index --output {tmp_path / 'index'} --vectors {tmp_path / 'vectors'}"
        + ("" if kind == "flat" else f" --type {kind}")
    )


def test_an_index_is_planned_before_there_are_vectors(shapes: Path, corpus: Path) -> None:
    found = plan_index(PlanIndexConfig(model=str(shapes), corpus=(corpus,)))
    assert found.amounts == {"documents": 40, "vector size": tiny.HIDDEN}
    assert found.disk["vectors"] == 40 * 4 * tiny.HIDDEN
    assert found.next_command.endswith(f"plan encode --model {shapes} --corpus {corpus}")


def test_words_are_planned_from_the_corpus_with_their_store(corpus: Path, tmp_path: Path) -> None:
    found = plan_index(PlanIndexConfig(type="bm25", corpus=(corpus,), output=tmp_path / "index"))
    result = build_index(IndexConfig(type="bm25", corpus=(corpus,), output=tmp_path / "index"))
    assert result.documents == found.amounts["documents"]
    assert found.disk_after == pytest.approx(folder_bytes(tmp_path / "index"), rel=0.3)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, "--vectors or --corpus: give what the index will be built from"),
        ({"corpus": (Path("c"),)}, "--model: is required with --corpus for --type flat"),
        ({"corpus": (Path("c"),), "vectors": Path("v")}, "--vectors or --corpus: give one of the two"),
        ({"vectors": Path("v"), "model": "m"}, "--model: goes with --corpus"),
        ({"corpus": (Path("c"),), "type": "sparse"}, "--vectors: is required for --type sparse; llara plan encode --s"),
        ({"vectors": Path("v"), "sample": 0}, "--sample: must be 1 or more, got 0"),
        ({"vectors": Path("v"), "calibrate": -1.0}, "--calibrate: must be 0 or more, got -1.0"),
    ],
)
def test_settings_that_do_not_fit_together(values: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlanIndexConfig(**values)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(fault)


def test_the_command_prints_a_table_and_the_job_to_run(
    shapes: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan", "adapt", "--model", shapes, "--corpus", corpus, "--calibrate", "0", "--fleet", "8xH100-80GB"]
    assert main([*map(str, line), "--steps", "7"]) == 0
    out, err = capsys.readouterr()
    assert "steps                    7\n" in out
    assert "fleet                    8 x H100-80GB: about " in out
    assert err.splitlines()[-1].endswith(f"adapt --model {shapes} --output OUTPUT --steps 7 --corpus {corpus}")
    assert main([*map(str, line), "--json", "--quiet"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fleet"]["fits"] is True and values["seconds"] is None
    assert values["disk_peak"] == sum(values["disk"].values())


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--corpus", "none.jsonl"], "none.jsonl: no such file or folder"),
        (["--model", "no-such/model", "--offline"], "hf download no-such/model"),
        (["--fleet", "8xH1000"], "unknown GPU 'H1000' (did you mean 'H100'?)"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], fault: str, shapes: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--model": str(shapes), "--corpus": str(corpus)}
    line = [word for flag, value in given.items() if flag not in flags for word in (flag, value)]
    assert main(["plan", "encode", *line, *flags]) == 2
    errors = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert len(errors) == 1 and fault in errors[0]


def test_a_row_that_adapt_would_stop_at_stops_its_plan(base: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "a", "text": "one"}\n{"_id": "b"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:2: no text"):
        plan_adapt(plan_of_adapt(base, corpus, tmp_path / "out"))
    corpus.write_text('{"_id": "a", "text": "one"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl: in a sample of it: no text of 4 tokens or more"):
        plan_adapt(plan_of_adapt(base, corpus, tmp_path / "out"))


def test_a_plan_is_not_started_many_times_over(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun, and name the GPUs with --fleet"):
        plan_adapt(plan_of_adapt(base, corpus, tmp_path / "out"))


def test_a_batch_too_large_for_the_time_is_made_smaller_and_it_says_so(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    config = plan_of_adapt(base, corpus, tmp_path / "out", calibrate=1e-9, batch_size=16, accumulation=2)
    found = plan_adapt(config)
    assert any("smaller batches were tried" in note for note in found.notes)
