import collections
import itertools
import tracemalloc

import numpy as np
import pytest

from llara.batching import Permutation, WindowedBatches, budget_batches, padding_share, shuffled_positions
from tests.reference import batching as slow


def some_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, count)


def windowed(lengths: np.ndarray, size: int, seed: int, window: int) -> WindowedBatches:
    return WindowedBatches(len(lengths), lambda rows: lengths[rows], size, seed, window)


def whole(count: int, seed: int = 0, number: int = 0) -> list[int]:
    return Permutation(count, seed, number)[np.arange(count)].tolist()


@pytest.mark.parametrize("count", [0, 1, 2, 57, 400])
@pytest.mark.parametrize("budget", [1, 64, 512, 10**9])
def test_budget_batches_equal_the_slow_twin(count: int, budget: int) -> None:
    lengths = some_lengths(count, seed=count)
    found = budget_batches(lengths, budget)
    assert [batch.tolist() for batch in found] == slow.budget_batches(lengths.tolist(), budget)


def test_every_row_exactly_once_and_within_the_budget() -> None:
    lengths = some_lengths(500)
    batches = budget_batches(lengths, 512)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(batch) * lengths[batch].max() <= 512 for batch in batches)


def test_a_row_beyond_the_budget_is_a_batch_by_itself() -> None:
    assert [batch.tolist() for batch in budget_batches([5, 900, 5, 901], 100)] == [[3], [1], [0, 2]]


def test_longest_rows_come_first_and_equal_ones_keep_their_order() -> None:
    assert [batch.tolist() for batch in budget_batches([2, 3, 2, 3], 6)] == [[1, 3], [0, 2]]


def test_rows_without_tokens_are_kept() -> None:
    assert sorted(np.concatenate(budget_batches([0, 0, 3], 2)).tolist()) == [0, 1, 2]


def test_padding_share() -> None:
    lengths = some_lengths(300)
    batches = budget_batches(lengths, 1024)
    share = padding_share(lengths, batches)
    assert share == pytest.approx(slow.padding_share(lengths.tolist(), [batch.tolist() for batch in batches]))
    assert 0 < share < 0.05
    assert padding_share([4, 4], [np.array([0, 1])]) == 0.0
    assert padding_share([1, 4], [np.array([0, 1])]) == pytest.approx(3 / 8)
    assert padding_share([], []) == 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10, 57, 400, 4097])
def test_a_permutation_equals_the_slow_twin(count: int) -> None:
    assert whole(count, 7, 3) == slow.permutation(count, 7, 3)


def test_a_permutation_takes_every_row_once() -> None:
    for count in [*range(200), 1000, 12_345, 65_536, 100_003]:
        assert sorted(whole(count, seed=count)) == list(range(count))


def test_a_permutation_follows_seed_and_number_alone() -> None:
    first = whole(1000, 1, 2)
    assert whole(1000, 1, 2) == first
    alike = [sum(a == b for a, b in zip(first, other, strict=True)) for other in (whole(1000, 1, 3), whole(1000, 2, 2))]
    assert max(alike) < 10  # one is expected by chance


def test_a_permutation_can_be_asked_for_any_part_in_any_shape() -> None:
    order = Permutation(100, 1, 2)
    every = order[np.arange(100)]
    picked = np.array([[99, 3], [3, 50]])
    assert order[picked].tolist() == every[picked].tolist()
    assert order[np.empty(0, dtype=np.int64)].tolist() == []
    assert len(order) == 100
    for position in (-1, 100):
        with pytest.raises(IndexError):
            order[np.array([position])]


def test_permutations_are_nearly_uniform() -> None:
    # Each of the 24 orders of four rows, about 250 times each; the standard deviation of a count is 15.5.
    counts = collections.Counter(tuple(whole(4, 0, number)) for number in range(6000))
    assert len(counts) == 24
    assert min(counts.values()) > 175 and max(counts.values()) < 325
    # Each row at each place: n (n - 1) is what chi-squared comes to for n rows.
    table = np.zeros((30, 30))
    for number in range(3000):
        table[np.arange(30), whole(30, 0, number)] += 1
    assert ((table - 100) ** 2 / 100).sum() < 30 * 29 * 1.25
    large = np.array(whole(50_000))
    assert abs(np.corrcoef(large, np.arange(50_000))[0, 1]) < 0.02
    assert abs(np.corrcoef(large[1:], large[:-1])[0, 1]) < 0.02


def test_a_permutation_of_any_size_takes_no_memory() -> None:
    tracemalloc.start()
    rows = Permutation(10**15, 0, 0)[np.arange(512)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(rows)) == 512 and rows.max() > 10**14
    assert peak < 2**20


@pytest.mark.parametrize("count", [1, 7, 64])
def test_any_part_of_the_stream_equals_the_slice_of_the_whole(count: int) -> None:
    every = slow.stream(count, 5 * count, seed=3)
    assert shuffled_positions(count, 0, 5 * count, seed=3).tolist() == every
    for start, stop in itertools.combinations(range(0, 5 * count, max(count // 3, 1)), 2):
        assert shuffled_positions(count, start, stop, seed=3).tolist() == every[start:stop]
    assert shuffled_positions(count, 4, 4, seed=3).tolist() == []


def test_each_pass_is_a_permutation_of_its_own() -> None:
    passes = shuffled_positions(50, 0, 150, seed=1).reshape(3, 50)
    assert all(sorted(each.tolist()) == list(range(50)) for each in passes)
    assert len({tuple(each.tolist()) for each in passes}) == 3
    assert shuffled_positions(50, 0, 50, seed=2).tolist() != passes[0].tolist()


@pytest.mark.parametrize(("rows", "size", "window"), [(100, 4, 3), (5, 4, 5), (97, 8, 16)])
def test_windowed_batches_equal_the_slow_twin(rows: int, size: int, window: int) -> None:
    lengths = some_lengths(rows)
    batches = windowed(lengths, size, 2, window)
    for number in range(3):
        found = [batches.batch(number * batches.per_pass + place).tolist() for place in range(batches.per_pass)]
        assert found == slow.windowed_batches(lengths.tolist(), size, 2, window, number)


def test_windowed_batches_ask_for_one_window_of_lengths_at_a_time() -> None:
    asked: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        asked.append(len(rows))
        return rows % 100

    batches = WindowedBatches(10**12, lengths, 32, seed=0)
    rows = [batches.batch(number) for number in (0, 3, 15, 16, 10**9)]
    assert asked == [512, 512, 512]
    assert len(np.unique(np.concatenate(rows))) == 5 * 32


def test_windowed_batches_do_not_depend_on_the_order_of_access() -> None:
    lengths = some_lengths(100)
    forwards = windowed(lengths, 4, seed=5, window=3)
    expected = [forwards.batch(number).tolist() for number in range(60)]
    backwards = windowed(lengths, 4, seed=5, window=3)
    assert [backwards.batch(number).tolist() for number in reversed(range(60))] == expected[::-1]
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert windowed(lengths, 4, seed=5, window=3).batch(number).tolist() == expected[number]
    assert windowed(lengths, 4, seed=6, window=3).batch(0).tolist() != expected[0]


def test_windowed_batches_lose_no_row_within_a_pass() -> None:
    batches = windowed(some_lengths(96), 4, seed=0, window=6)  # 4 windows of 24 rows are one pass
    for first in (0, 24, 48):
        rows = np.concatenate([batches.batch(first + number) for number in range(24)])
        assert sorted(rows.tolist()) == list(range(96))


def test_windowed_batches_hold_rows_of_similar_length() -> None:
    lengths = some_lengths(512)
    batches = windowed(lengths, 8, seed=0, window=16)
    spread = [int(np.ptp(lengths[batches.batch(number)])) for number in range(64)]
    assert float(np.mean(spread)) < 30  # of 199; a random batch of 8 spreads over about 155
    order = [int(lengths[batches.batch(number)].mean()) for number in range(16)]
    assert order != sorted(order)


@pytest.mark.parametrize(("rows", "size", "window"), [(5, 4, 5), (100, 32, 16), (97, 4, 3), (3, 8, 2)])
def test_every_pass_holds_every_row_once(rows: int, size: int, window: int) -> None:
    batches = windowed(some_lengths(rows), size, seed=0, window=window)
    assert batches.per_pass == -(-rows // size)
    for number in range(3):
        parts = [batches.batch(number * batches.per_pass + place) for place in range(batches.per_pass)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
        assert all(0 < len(part) <= size for part in parts)
