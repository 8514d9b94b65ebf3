"""What a model may be called, where it runs, and in which dtype."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llara import loading
from llara.config import ModelConfig
from llara.errors import ConfigError, ModelError
from llara.hardware import WORKS
from llara.hub import resolve
from llara.loading import load_model, pick_device, pick_dtype
from llara.templates import PAPER


def test_mini_loads_with_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(ModelConfig(model="mini", verify=True))
    assert model.contract.bos
    assert model.contract.template == PAPER
    assert model.has_head
    assert next(model.lm.parameters()).dtype == torch.float32
    assert model.bind().encode(["a"], "query", 64)[0][0] == model.tokenizer.bos_token_id
    assert capsys.readouterr().err == ""


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "~/none-such", "a/b/c", "none"):
        with pytest.raises(ModelError, match=r"none.*|a/b/c: no such folder, and not a hub id of the form"):
            resolve(name)


@pytest.mark.parametrize("offline", [True, False])
def test_hub_id_that_cannot_be_fetched_names_the_command(offline: bool) -> None:
    message = (
        r"^nobody/no-such-model: neither a folder here nor in the hub's cache \(.+\), and it could not be fetched "
        r"\(\w+\); get it with: hf download nobody/no-such-model$"
    )
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(model="nobody/no-such-model", offline=offline))


def test_network_that_breaks_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadError(Exception):
        """Stands for the HTTP library's own errors, which are no OSError."""

    def broken(*_: Any, **__: Any) -> str:
        raise ReadError("connection reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ModelError, match=r"it could not be fetched \(ReadError\); get it with: hf download some/model"):
        resolve("some/model")


def test_hub_id_takes_no_pickle_and_code_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def record(
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        local_files_only: bool,
    ) -> str:
        asked.append((name, revision, "*.py" in allow_patterns, "*.safetensors" in allow_patterns, local_files_only))
        assert "consolidated*" in ignore_patterns
        assert not {"*", "*.bin", "*.pt", "*.pkl"} & set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", record)
    assert resolve("some/model") == tmp_path
    resolve("some/model@refs/pr/1", offline=True, remote_code=True)
    assert asked == [("some/model", None, False, True, False), ("some/model", "refs/pr/1", True, True, True)]


def test_a_revision_is_part_of_the_command_that_fetches_it() -> None:
    with pytest.raises(ModelError, match=r"get it with: hf download nobody/no-such-model --revision v1$"):
        resolve("nobody/no-such-model@v1", offline=True)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("SEQ_CLS", "is a reranker, which scores a query with a document"),
        ("CAUSAL_LM", "is a PEFT adapter; merge it into its base model"),
    ],
)
def test_an_adapter_from_the_hub_is_no_retriever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str, said: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": task}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match=said):
        resolve("some/adapter")
    assert resolve("some/adapter", marks=("adapter_config.json",)) == tmp_path


@pytest.mark.parametrize("name", ["no body/model", "nobody/..", "-x/y"])
def test_name_that_no_hub_id_can_have(name: str) -> None:
    with pytest.raises(ModelError, match=r"neither a folder here nor in the hub's cache"):
        resolve(name, offline=True)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in {"cpu", "cuda", "mps"}
    for name in ("cuda:99", "nonsense", ""):
        with pytest.raises(ConfigError, match=rf"--device: '{name}' is not available here"):
            pick_device(name)


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    # Not every CPU can multiply bfloat16; what a child process finds is test_hardware.py's matter.
    monkeypatch.setattr(loading, "probe_torch", lambda: ((), 1, WORKS))
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("float16", cpu) == torch.float16
    monkeypatch.setattr(loading, "probe_torch", lambda: ((), 1, "kills the process (SIGILL); use --dtype float32"))
    with pytest.raises(ConfigError, match=r"bfloat16 on this CPU kills the process .*float32"):
        pick_dtype("bfloat16", cpu)
    assert pick_dtype("auto", cpu) == torch.float32
