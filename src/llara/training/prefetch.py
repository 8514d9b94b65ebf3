"""Batches are read, cut and padded in a thread of their own, so that a step does not wait for them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")

AHEAD = 4  # batches held ready: enough to ride out a slow one, few enough to need no memory of note


class _Made(NamedTuple, Generic[Item]):
    """What came of one number: an item, or the error in its place."""

    number: int
    item: Item | None
    error: BaseException | None


class Prefetch(Generic[Item]):
    """Makes the items of a sequence of numbers ahead of time; a context manager.

    An error while making an item is raised by the `take` that asks for this item, in the thread that asks. Outside the
    `with` block nothing is made: the thread has ended when it is left.

    Args:
        make: Makes the item of a number; called in the thread, one call at a time.
        numbers: The numbers, in the order in which they will be asked for.
        ahead: How many items may lie ready.

    Attributes:
        waited: Seconds that `take` has spent until an item was ready.
    """

    def __init__(self, make: Callable[[int], Item], numbers: Iterable[int], ahead: int = AHEAD) -> None:
        self._make, self._numbers, self._ahead = make, numbers, ahead
        self._ready: deque[_Made[Item]] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self.waited = 0.0

    def __enter__(self) -> "Prefetch[Item]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def take(self, number: int) -> Item:
        """Returns the item of the next number, which must be the one that is asked for."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            assert self._ready, f"batch {number} was asked for after the last one"
            made = self._ready.popleft()
            self._changed.notify_all()
        self.waited += time.perf_counter() - began
        if made.error is not None:
            raise made.error
        assert made.number == number and made.item is not None, f"batch {number} was asked for, {made.number} is next"
        return made.item

    def _run(self) -> None:
        for number in self._numbers:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._ahead)
                if self._stopped:
                    break
            try:
                made = _Made[Item](number, self._make(number), None)
            except BaseException as error:  # raised where the item is asked for
                made = _Made[Item](number, None, error)
            with self._changed:
                self._ready.append(made)
                self._changed.notify_all()
            if made.error is not None:
                break
        with self._changed:
            self._ended = True
            self._changed.notify_all()
