"""Reading time and memory off the machine."""

from pathlib import Path

import pytest

from llara.plan.measure import (
    Clock,
    existing,
    extend,
    folder_bytes,
    forget_peak,
    held_memory,
    make_twice,
    peak_memory,
    scratch,
)
from llara.plan.report import duration, size


def test_what_is_done_once_is_not_counted_again() -> None:
    assert extend(10, 1.1, 40, 1.4, 1040) == pytest.approx(11.4)  # 1 s once, and 10 ms each
    assert extend(10, 1.5, 40, 1.4, 1040) == 1.4  # noise: it does not fall
    assert extend(0, 0.0, 40, 2.0, 80) == 4.0
    assert extend(40, 2.0, 40, 2.0, 80) == 4.0


class Hands:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr("llara.plan.measure.time", made)
    return made


def test_what_only_the_first_time_takes_is_told_apart(hands: Hands) -> None:
    takes = iter([5.0, 2.0])

    def make() -> str:
        hands.now += next(takes)
        return f"made at {hands.now}"

    assert make_twice(make) == ("made at 7.0", 3.0)


def test_the_peak_is_that_of_the_job_and_not_of_what_was_before() -> None:
    first = bytearray(64 * 2**20)
    assert peak_memory() >= len(first)
    del first
    forget_peak()
    after = peak_memory()
    if after > held_memory() + 2**20:
        pytest.skip("this system keeps the peak of the process")
    block = bytearray(96 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    assert peak_memory() - after == pytest.approx(len(block), rel=0.1)


def test_scratch_lies_beside_the_output_and_goes(tmp_path: Path) -> None:
    with scratch(tmp_path / "not" / "there" / "yet") as folder:
        assert folder.parent == tmp_path
        (folder / "file").write_bytes(b"12345")
        assert folder_bytes(tmp_path) == 5
    assert not folder.exists()
    assert existing(tmp_path / "a" / "b") == tmp_path


def test_a_clock_adds_up_its_parts(hands: Hands) -> None:
    clock = Clock()
    for name, seconds in (("read", 1.0), ("write", 2.0), ("read", 4.0)):
        with clock.part(name):
            hands.now += seconds
    assert clock.seconds == {"read": 5.0, "write": 2.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.4, "99.4 s"), (754, "12 min 34 s"), (7260, "2 h 1 min"), (10 * 86400, "10.0 days")],
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (1234, "1.23 kB"), (999_600, "1,000 kB"), (80 * 10**9, "80 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes_as_people_say_them(count: float, text: str) -> None:
    assert size(count) == text
