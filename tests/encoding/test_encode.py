"""The job `encode`, with a retriever that needs no model."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import llara.retriever
from llara.config import EncodeConfig
from llara.encoding.encode import encode
from llara.encoding.shards import Vectors
from llara.errors import ConfigError, DataError, StorageError
from llara.files import FolderLock
from tests.encoding.helpers import FakeRetriever, corpus_lines, tree, write_corpus


@pytest.fixture
def retriever(monkeypatch: pytest.MonkeyPatch) -> FakeRetriever:
    fake = FakeRetriever()
    monkeypatch.setattr(llara.retriever, "Retriever", fake)
    return fake


@pytest.fixture
def config(tmp_path: Path) -> EncodeConfig:
    rows = corpus_lines(25)
    rows[7] = b"bad"
    corpus = write_corpus(tmp_path / "corpus.jsonl", rows)
    return EncodeConfig(model="mini", corpus=(corpus,), output=tmp_path / "vectors", shard_size=10, token_budget=512)


def changed(config: EncodeConfig, **changes: Any) -> EncodeConfig:
    from dataclasses import replace

    return replace(config, **changes)


def test_a_corpus_becomes_a_vectors_folder(
    config: EncodeConfig, retriever: FakeRetriever, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(config) == (config.output, 4, 3, 24, 1, 0)
    assert retriever.loaded == vars(config)
    assert retriever.calls == [(9, 512, 160), (10, 512, 160), (5, 512, 160)], "one window per shard"
    vectors = Vectors.open(config.output, verify=True)
    assert vectors.identity["passage_length"] == 160
    assert vectors.identity["model_fingerprint"] == "abc"
    assert vectors.manifest["about"] == {"model_path": "mini"}
    document = vectors.documents.get(1)
    assert next(vectors.shards())[1].tolist() == [len(document.text), len(document.title), 0, 1]
    assert tomllib.loads((config.output / "config.toml").read_text())["shard_size"] == 10
    assert "encode: 25 passages" in capsys.readouterr().err


def test_a_second_run_encodes_nothing(
    config: EncodeConfig, retriever: FakeRetriever, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(config)
    before = tree(config.output)
    retriever.calls.clear()
    capsys.readouterr()
    assert encode(config).reused_shards == 3
    assert retriever.calls == []
    assert tree(config.output) == before
    assert "all done before" in capsys.readouterr().err


def test_a_token_budget_may_change_and_a_length_may_not(config: EncodeConfig, retriever: FakeRetriever) -> None:
    encode(config)
    fingerprint = Vectors.open(config.output).fingerprint
    encode(changed(config, token_budget=4096))
    assert Vectors.open(config.output).fingerprint == fingerprint
    with pytest.raises(StorageError, match="passage_length was 160, is now 99"):
        encode(changed(config, passage_length=99))


def test_a_local_model_is_remembered_from_the_folder_and_not_as_it_was_typed(
    config: EncodeConfig, retriever: FakeRetriever, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "ours").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    encode(changed(config, model="models/ours"))
    assert retriever.loaded["model"] == "models/ours"
    assert Vectors.open(config.output).manifest["about"] == {"model_path": "../models/ours"}
    monkeypatch.chdir(tmp_path / "models")
    encode(changed(config, model="ours"))
    assert Vectors.open(config.output).manifest["about"] == {"model_path": "../models/ours"}
    encode(changed(config, model="organisation/name"))
    assert Vectors.open(config.output).manifest["about"] == {"model_path": "organisation/name"}


def test_a_corrected_command_goes_through(
    config: EncodeConfig, retriever: FakeRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("--passage-length: 3 leaves no room for text")

    with monkeypatch.context() as patched:
        patched.setattr(FakeRetriever, "tokenise_passages", refuse)
        with pytest.raises(ConfigError, match="no room"):
            encode(changed(config, passage_length=3))
    assert encode(config) == (config.output, 4, 3, 24, 1, 0)
    with pytest.raises(StorageError, match="passage_length was 160, is now 3"):
        encode(changed(config, passage_length=3))


def test_faults_are_found_before_a_model_is_loaded(
    config: EncodeConfig, retriever: FakeRetriever, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        encode(changed(config, corpus=(tmp_path / "missing.jsonl",)))
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match="was not made by llara"):
        encode(config)
    (config.output / "thesis.tex").unlink()
    with FolderLock(config.output), pytest.raises(StorageError, match="is being written by process"):
        encode(config)
    assert retriever.loaded == {}


def test_a_lock_that_a_killed_encoder_left_is_in_nobodys_way(config: EncodeConfig, retriever: FakeRetriever) -> None:
    config.output.mkdir()
    (config.output / ".lock").write_text("process 999999 on another machine")
    assert encode(config).documents == 24
    assert not (config.output / ".lock").exists()
