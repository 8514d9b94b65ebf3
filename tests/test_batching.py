import itertools

import numpy as np
import pytest

from llara.batching import WindowedBatches, budget_batches, padding_share, shuffled_positions
from tests.reference import batching as slow


def some_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 200, count)


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


@pytest.mark.parametrize("count", [1, 7, 64])
def test_any_part_of_the_stream_equals_the_slice_of_the_whole(count: int) -> None:
    whole = slow.stream(count, 5 * count, seed=3)
    assert shuffled_positions(count, 0, 5 * count, seed=3).tolist() == whole
    for start, stop in itertools.combinations(range(0, 5 * count, max(count // 3, 1)), 2):
        assert shuffled_positions(count, start, stop, seed=3).tolist() == whole[start:stop]
    assert shuffled_positions(count, 4, 4, seed=3).tolist() == []


def test_each_pass_is_a_permutation_of_its_own() -> None:
    passes = shuffled_positions(50, 0, 150, seed=1).reshape(3, 50)
    assert all(sorted(each.tolist()) == list(range(50)) for each in passes)
    assert len({tuple(each.tolist()) for each in passes}) == 3
    assert shuffled_positions(50, 0, 50, seed=2).tolist() != passes[0].tolist()


def test_windowed_batches_do_not_depend_on_the_order_of_access() -> None:
    lengths = some_lengths(100)
    forwards = WindowedBatches(lengths, 4, seed=5, window=3)
    expected = [forwards.batch(number).tolist() for number in range(60)]
    backwards = WindowedBatches(lengths, 4, seed=5, window=3)
    assert [backwards.batch(number).tolist() for number in reversed(range(60))] == expected[::-1]
    for number in np.random.default_rng(0).permutation(60).tolist():
        assert WindowedBatches(lengths, 4, seed=5, window=3).batch(number).tolist() == expected[number]
    assert WindowedBatches(lengths, 4, seed=6, window=3).batch(0).tolist() != expected[0]


def test_windowed_batches_lose_no_row_within_a_pass() -> None:
    batches = WindowedBatches(some_lengths(96), 4, seed=0, window=6)  # 4 windows of 24 rows are one pass
    for first in (0, 24, 48):
        rows = np.concatenate([batches.batch(first + number) for number in range(24)])
        assert sorted(rows.tolist()) == list(range(96))


def test_windowed_batches_hold_rows_of_similar_length() -> None:
    lengths = some_lengths(512)
    batches = WindowedBatches(lengths, 8, seed=0, window=16)
    spread = [int(np.ptp(lengths[batches.batch(number)])) for number in range(64)]
    assert float(np.mean(spread)) < 30  # of 199; a random batch of 8 spreads over about 155
    order = [int(lengths[batches.batch(number)].mean()) for number in range(16)]
    assert order != sorted(order)


@pytest.mark.parametrize(("rows", "size", "window"), [(5, 4, 5), (100, 32, 16), (97, 4, 3), (3, 8, 2)])
def test_every_pass_holds_every_row_once(rows: int, size: int, window: int) -> None:
    batches = WindowedBatches(some_lengths(rows), size, seed=0, window=window)
    assert batches.per_pass == -(-rows // size)
    for number in range(3):
        parts = [batches.batch(number * batches.per_pass + place) for place in range(batches.per_pass)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
        assert all(0 < len(part) <= size for part in parts)
