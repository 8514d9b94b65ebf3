"""GradCache against the plain loss over the same chunks, with dropout, LoRA, and two processes."""

import inspect
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llara.losses.cached import GradCache, RandomStates, gather_rows, own_gradient, processes
from llara.losses.contrast import InfoNCE
from llara.losses.rows import row_gradients
from tests.losses.cached_job import (
    DROPOUT,
    LENGTHS,
    POSITIVES,
    QUERIES,
    cached_gradients,
    chunks_of,
    encoder,
    make_model,
    plain_gradients,
    plain_gradients_of_two,
    relative,
    token_rows,
    trained,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", [1, 4, 100])  # 15 rows: the last chunk of 4 has 3; 100 is one chunk
def test_gradients_are_those_of_the_plain_loss(
    lora: bool, temperature: float, dtype: torch.dtype, bound: float, size: int
) -> None:
    model = make_model(dtype, lora=lora, dropout=0.3)
    rows = token_rows()
    expected_loss, expected = plain_gradients(model, rows, chunks_of(size), temperature)
    loss, found = cached_gradients(model, rows, chunks_of(size), temperature)
    assert float(expected.norm()) > 0.1
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert relative(found, expected) < bound


@pytest.mark.parametrize("size", [1, 4])
def test_without_dropout_they_are_those_of_one_full_batch(size: int) -> None:
    model = make_model(torch.float32, lora=True, dropout=0.0)
    rows = token_rows()
    _, whole = plain_gradients(model, rows, chunks_of(100), 0.05)
    _, found = cached_gradients(model, rows, chunks_of(size), 0.05)
    assert relative(found, whole) < 1e-5


def test_temperature_changes_the_gradients() -> None:
    model, rows = make_model(torch.float64, lora=False, dropout=0.0), token_rows()
    sharp, flat = (cached_gradients(model, rows, chunks_of(4), temperature)[1] for temperature in (0.05, 1.0))
    assert relative(sharp, flat) > 0.5


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_kept_graphs_change_no_bit(keep: int) -> None:
    model, rows = make_model(torch.float32, lora=True, dropout=0.3), token_rows()
    _, expected = cached_gradients(model, rows, chunks_of(4), 0.05)
    _, found = cached_gradients(model, rows, chunks_of(4), 0.05, keep=keep)
    assert torch.equal(found, expected)


def test_the_random_numbers_that_follow_are_those_after_one_encoding() -> None:
    model, rows = make_model(torch.float32, lora=False, dropout=0.3), token_rows()
    plain_gradients(model, rows, chunks_of(4), 0.05)
    expected = torch.rand(3)
    cached_gradients(model, rows, chunks_of(4), 0.05)
    assert torch.equal(torch.rand(3), expected)


def test_one_graph_at_a_time_is_in_memory() -> None:
    model, rows = make_model(torch.float32, lora=False, dropout=0.0), token_rows()
    alive: list[weakref.ref[Tensor]] = []
    encode = encoder(model, rows)

    def watched(chunk: list[int]) -> Tensor:
        assert all(reference() is None for reference in alive)
        vectors = encode(chunk)
        if vectors.requires_grad:
            alive.append(weakref.ref(vectors))
        return vectors

    chunks = chunks_of(4)
    cache = GradCache(watched, chunks, [torch.tensor(chunk) for chunk in chunks], CPU)
    vectors = cache.vectors()
    assert not alive
    assert not vectors.requires_grad
    assert len(vectors) == len(rows)
    for number in range(len(chunks)):
        cache.surrogate(number, torch.ones_like(vectors)).backward()
    assert len(alive) == len(chunks)


def test_rewound_gives_the_same_numbers_and_leaves_the_stream_alone() -> None:
    states = RandomStates(2, CPU)
    drawn = []
    for number in range(2):
        states.record(number)
        drawn.append(torch.rand(4))
    following = torch.get_rng_state()
    for number in (1, 0, 1):
        with states.rewound(number):
            assert torch.equal(torch.rand(4), drawn[number])
        assert torch.equal(torch.get_rng_state(), following)
    with pytest.raises(ZeroDivisionError), states.rewound(0):
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), following)


def test_another_device_has_its_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on an Apple GPU draws from that GPU's generator."""
    for function in (torch.mps.get_rng_state, torch.cuda.get_rng_state):
        inspect.signature(function).bind(torch.device("mps"))  # TypeError where it takes no device
    state = torch.tensor([1], dtype=torch.uint8)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: state.clone())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new, device: state.copy_(new))
    states = RandomStates(1, torch.device("mps"))
    states.record(0)
    state.fill_(2)
    with states.rewound(0):
        assert state.item() == 1
    assert state.item() == 2


def test_alone_nothing_is_gathered() -> None:
    rows = torch.rand(3, 2, requires_grad=True)
    gathered, start = gather_rows(rows)
    assert processes() == 1
    assert torch.equal(gathered, rows) and not gathered.requires_grad
    assert start == 0
    gradient = torch.rand(3, 2)
    assert torch.equal(own_gradient(gradient.clone(), 1, 2), gradient[1:])


# Two processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two real processes found; see `cached_job.py`."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.losses.cached_job", str(folder)]
    children = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:  # one waits for the other, and for ever where that has failed
            child.kill()
            child.communicate()
    assert [child.returncode for child in children] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_compare_with_each_others_passages(two_processes: list[dict[str, Any]]) -> None:
    """With dropout, LoRA, uneven shares, and chunks of other sizes, one of them not full."""
    model, rows = make_model(torch.float64, lora=True, dropout=DROPOUT), token_rows()
    loss, expected = plain_gradients_of_two(model, rows, 0.05)
    assert sum(answer["loss"] for answer in two_processes) == pytest.approx(loss, rel=1e-12)
    for answer in two_processes:
        assert relative(torch.tensor(answer["gradient"], dtype=torch.float64), expected) < 1e-12
    _, otherwise = plain_gradients(model, rows, chunks_of(100), 0.05)
    assert relative(otherwise, expected) > 1e-3, "dropout decides the gradients"


def test_processes_may_differ_in_passages_and_chunks(two_processes: list[dict[str, Any]]) -> None:
    assert [answer["passages"] for answer in two_processes] == [6, 4]
    assert [answer["chunks"] for answer in two_processes] == [3, 6]
    assert [answer["starts"] for answer in two_processes] == [0, 6]
    assert two_processes[0]["gathered"] == two_processes[1]["gathered"] == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_gradients_are_exchanged_with_the_last_chunk_only(two_processes: list[dict[str, Any]]) -> None:
    left, right = (torch.tensor(answer["alone"]) for answer in two_processes)
    assert left.any() and right.any()
    assert relative(left, right) > 0.1


def test_the_job_covers_what_it_says() -> None:
    assert len(LENGTHS) == QUERIES + 10
    assert len(set(LENGTHS)) > 5
    assert POSITIVES.tolist() == [0, 2, 5, 6, 8]
    model, rows = make_model(torch.float32, lora=True, dropout=0.5), token_rows()
    assert 0 < sum(value.numel() for value in trained(model)) < sum(value.numel() for value in model.lm.parameters())
    encode = encoder(model, rows)
    assert not torch.equal(encode([0]), encode([0])), "dropout is on"
    loss = InfoNCE(POSITIVES, 0.05)
    vectors = encode(list(range(15))).detach()
    assert row_gradients([loss], [1.0], vectors[:QUERIES], vectors[QUERIES:])[1].any()
