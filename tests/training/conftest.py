"""A tiny base model and a corpus, made once."""

from pathlib import Path

import pytest

from tests import tiny
from tests.training.helpers import write_text


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model folder of Llama's shape, with an LM head of its own."""
    return tiny.save_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of twelve documents."""
    return write_text(tmp_path_factory.mktemp("corpus") / "text.jsonl")
