from typing import Any

import numpy as np
import pytest

from llara import Retriever
from llara.contract import Contract
from llara.errors import ConfigError
from tests import tiny


def retriever(**changes: Any) -> Retriever:
    return Retriever(tiny.model("llama", contract=Contract(**{"bos": True, **changes})))


def close(left: Any, right: Any) -> bool:
    return bool(np.abs(left - right).max() < 1e-5)


def test_vectors_are_float32_of_unit_length_in_order() -> None:
    made = retriever()
    vectors = made.encode_queries(list(tiny.TEXT))
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(tiny.TEXT), made.dim)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    for text, vector in zip(tiny.TEXT, vectors, strict=True):
        assert close(made.encode_queries([text])[0], vector)


def test_queries_and_passages_go_through_their_own_side() -> None:
    made = retriever()
    assert close(made.encode_passages(["text"]), made.model.encode(["text"], "passage").numpy())
    assert not close(made.encode_passages(["text"]), made.encode_queries(["text"]))


def test_titles_are_joined_as_the_contract_says() -> None:
    made = retriever(title_separator=": ")
    found = made.encode_passages(["the sky", "a file"], titles=["Blue", ""])
    assert close(found, made.encode_passages(["Blue: the sky", "a file"]))
    assert not close(found, made.encode_passages(["the sky", "a file"]))


def test_no_title_separator_leaves_titles_out() -> None:
    made = retriever(title_separator=None)
    assert close(made.encode_passages(["the sky"], titles=["Blue"]), made.encode_passages(["the sky"]))


def test_empty_title_separator_joins() -> None:
    made = retriever(title_separator="")
    assert close(made.encode_passages(["the sky"], titles=["Blue"]), made.encode_passages(["Bluethe sky"]))


def test_one_string_instead_of_a_list_is_refused() -> None:
    made = retriever()
    with pytest.raises(ConfigError, match=r"^texts: give a list of texts, not one string$"):
        made.encode_queries("why")
    with pytest.raises(ConfigError, match=r"^texts: give a list of texts, not one string$"):
        made.encode_passages("why")
    with pytest.raises(ConfigError, match=r"^titles: give a list of titles, not one string$"):
        made.encode_passages(["a", "b"], titles="ab")


def test_titles_of_another_number_are_refused() -> None:
    message = r"^titles: 1 for 2 texts; give one per text, empty where there is none$"
    with pytest.raises(ConfigError, match=message):
        retriever().encode_passages(["a", "b"], titles=["x"])
    with pytest.raises(ConfigError, match=r"^titles: 0 for 2 texts"):
        retriever().encode_passages(["a", "b"], titles=[])


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a passage length of 5 tokens leaves no room for text"):
        retriever().encode_passages(["a"], max_length=5)


def test_nothing_to_encode() -> None:
    made = retriever()
    assert made.encode_queries([]).shape == (0, made.dim)
    assert made.encode_passages([], titles=[]).shape == (0, made.dim)


def test_token_budget_changes_no_vector_and_progress_is_told() -> None:
    made, seen = retriever(), []
    expected = made.encode_passages(list(tiny.TEXT))
    assert close(made.encode_passages(list(tiny.TEXT), token_budget=1, on_batch=seen.append), expected)
    assert seen == [1] * len(tiny.TEXT)


def test_identity_says_what_decides_the_vectors() -> None:
    found = retriever(passage_length=99).identity
    assert found["dtype"] == "float32"
    assert found["dim"] == tiny.HIDDEN
    assert found["contract"]["passage_length"] == 99
    assert found != retriever(passage_length=98).identity
    assert retriever(passage_length=98).passage_length == 98
