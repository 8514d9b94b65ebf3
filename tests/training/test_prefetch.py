"""Items made ahead: in order, never too far, errors where they are asked for, and no thread left behind."""

import threading
import time
from collections.abc import Callable

import pytest

from llara.training import prefetch
from llara.training.prefetch import AHEAD, Prefetch


def eventually(condition: Callable[[], bool]) -> bool:
    """Waits up to five seconds for something that another thread does."""
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_items_come_in_order_and_are_made_in_another_thread() -> None:
    threads = set()

    def make(number: int) -> int:
        threads.add(threading.current_thread().name)
        return number * number

    with Prefetch(make, range(3, 50)) as items:
        assert [items.take(number) for number in range(3, 50)] == [number**2 for number in range(3, 50)]
    assert threads == {"prefetch"}


def test_only_a_few_items_lie_ready() -> None:
    made: list[int] = []
    with Prefetch(lambda number: made.append(number) or number, range(1000)) as items:
        assert eventually(lambda: len(made) == AHEAD)
        time.sleep(0.05)
        assert len(made) == AHEAD
        items.take(0)
        assert eventually(lambda: len(made) == AHEAD + 1)
    assert len(made) <= AHEAD + 1


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_is_raised_by_who_asks_for_its_item(bad: int) -> None:
    def make(number: int) -> int:
        if number == bad:
            raise OSError("the disk is gone")
        return number

    with Prefetch(make, range(5)) as items:
        assert [items.take(number) for number in range(bad)] == list(range(bad))
        with pytest.raises(OSError, match="the disk is gone"):
            items.take(bad)


def test_an_error_ahead_does_not_spoil_what_comes_before() -> None:
    def make(number: int) -> int:
        if number == 1:
            raise ValueError("bad row")
        return number

    with Prefetch(make, range(5)) as items:
        assert eventually(lambda: not items._thread.is_alive())
        assert items.take(0) == 0
        with pytest.raises(ValueError, match="bad row"):
            items.take(1)


def test_no_thread_outlives_the_block_however_it_is_left() -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Prefetch(lambda number: number, range(1000)) as items:
        items.take(0)
        raise KeyboardInterrupt
    assert threading.active_count() == before
    with Prefetch(lambda number: number, range(2)):
        pass
    assert threading.active_count() == before


def test_a_number_out_of_turn_is_a_fault() -> None:
    with Prefetch(lambda number: number, range(2)) as items:
        with pytest.raises(AssertionError, match="batch 1 was asked for, 0 is next"):
            items.take(1)
        items.take(1)
        with pytest.raises(AssertionError, match="batch 2 was asked for after the last one"):
            items.take(2)


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 4.0, 10.0, 10.5])
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: next(clock))
    with Prefetch(lambda number: number, range(2)) as items:
        items.take(0)
        assert items.waited == 3.0
        items.take(1)
        assert items.waited == 3.5
