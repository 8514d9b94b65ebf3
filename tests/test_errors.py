"""The errors say what, where and what to do."""

from pathlib import Path

import pytest

from llara.errors import ConfigError, DataError, LlaraError, MissingExtra, ModelError, StorageError, nearest


def test_every_kind_is_a_llara_error() -> None:
    for kind in (ConfigError, DataError, MissingExtra, ModelError, StorageError):
        assert issubclass(kind, LlaraError)


def test_a_bad_row_names_file_and_line() -> None:
    assert str(DataError("corpus.jsonl", 7, "no id")) == "corpus.jsonl:7: no id"
    assert str(DataError(Path("corpus.jsonl"), None, "is empty")) == "corpus.jsonl: is empty"


def test_what_a_row_holds_does_not_flood_the_message() -> None:
    reason = str(DataError("corpus.jsonl", 7, f"the id {'x' * 10**6!r} holds white space").reason)
    assert len(reason) < 1100
    assert reason.startswith("the id 'xxx") and reason.endswith("xxx' holds white space")


def test_a_config_error_keeps_its_problems_apart() -> None:
    error = ConfigError(["--a: is wrong", "--b: is wrong"])
    assert error.problems == ("--a: is wrong", "--b: is wrong")
    assert str(error) == "--a: is wrong; --b: is wrong"
    assert ConfigError("--a: is wrong").problems == ("--a: is wrong",)


def test_storage_and_extras_name_the_place_and_the_remedy() -> None:
    assert str(StorageError("x/y", "is missing")) == "x/y: is missing"
    assert str(MissingExtra("reading parquet", "data")).endswith("pip install 'llara[data]'")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("modle", " (did you mean 'model'?)"), ("corpsu", " (did you mean 'corpus'?)"), ("zzz", ""), ("", "")],
)
def test_the_nearest_name(name: str, expected: str) -> None:
    assert nearest(name, ["model", "corpus", "output"]) == expected
