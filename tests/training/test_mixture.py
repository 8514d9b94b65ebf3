"""Batches from several sets: the right shares, every example in turn, nothing but the number decides."""

from collections import Counter

import numpy as np
import pytest

from llara.batching import shuffled_positions
from llara.training.mixture import FINEST, Mixture, places_of

SIZES = (40, 12, 300)


def drawn(mixture: Mixture, first: int, last: int) -> list[list[tuple[int, int]]]:
    """(set, row) of each example, batch by batch."""
    return [
        [(picked.set, row) for picked in mixture.batch(number) for row in picked.rows.tolist()]
        for number in range(first, last)
    ]


@pytest.mark.parametrize(
    ("sizes", "mixing", "places", "expected"),
    [
        ((1, 1), 1.0, 10, [5, 5]),
        ((7, 3), 1.0, 10, [7, 3]),
        ((100, 10), 0.0, 10, [5, 5]),
        ((900, 100), 0.5, 100, [75, 25]),  # 30 : 10
        ((10**9, 1), 1.0, 100, [100, 1]),  # none is left out
        ((10**300, 10**300), 50.0, 3, [2, 1]),
    ],
)
def test_places_are_in_proportion(sizes: tuple[int, ...], mixing: float, places: int, expected: list[int]) -> None:
    assert places_of(sizes, mixing, places).tolist() == expected


def test_one_set_is_one_stream_of_shuffled_passes() -> None:
    mixture = Mixture([7], 3, seed=5)
    rows = [row for batch in drawn(mixture, 0, 14) for _, row in batch]
    assert rows == shuffled_positions(7, 0, 42, 5).tolist()
    assert mixture.per_pass == pytest.approx(7 / 3)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_batches_follow_from_their_number_alone(homogeneous: bool, mixing: float) -> None:
    first, again = (Mixture(SIZES, 4, 3, None, mixing, homogeneous=homogeneous) for _ in range(2))
    made = drawn(first, 0, 40)
    assert [drawn(again, number, number + 1)[0] for number in reversed(range(40))] == made[::-1]
    assert drawn(Mixture(SIZES, 4, 4, None, mixing, homogeneous=homogeneous), 0, 40) != made
    assert all(len(batch) == 4 for batch in made)
    of_one_set = [len({part for part, _ in batch}) == 1 for batch in made]
    assert all(of_one_set) == homogeneous


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize(("mixing", "weights"), [(1.0, None), (1.0, (3, 1, 1)), (0.5, None), (0.0, (5, 1, 1))])
def test_shares_of_the_sets(homogeneous: bool, mixing: float, weights: tuple[int, ...] | None) -> None:
    mixture = Mixture(SIZES, 4, 0, weights, mixing, homogeneous=homogeneous)
    count = 2 * FINEST if homogeneous else 1000
    found = Counter(part for batch in drawn(mixture, 0, count) for part, _ in batch)
    wanted = np.array([size * weight for size, weight in zip(SIZES, weights or (1, 1, 1), strict=True)]) ** mixing
    for part, share in enumerate(wanted / wanted.sum()):
        assert found[part] / (4 * count) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("mixing", [0.3, 1.0])
def test_every_example_of_a_set_in_turn(homogeneous: bool, mixing: float) -> None:
    mixture = Mixture(SIZES, 4, 1, None, mixing, homogeneous=homogeneous)
    streams: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for batch in drawn(mixture, 0, 2500):
        for part, row in batch:
            streams[part].append(row)
    assert sum(map(len, streams.values())) == 10_000
    for part, rows in streams.items():
        size = SIZES[part]
        passes = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        assert len(passes) > 3
        assert all(sorted(each) == list(range(size)) for each in passes)
        assert passes[0] != passes[1]


@pytest.mark.parametrize("homogeneous", [True, False])
def test_shares_hold_in_every_stretch(homogeneous: bool) -> None:
    mixture = Mixture((3000, 1000), 1, 0, homogeneous=homogeneous)
    parts = np.array([part for batch in drawn(mixture, 0, 8000) for part, _ in batch])
    in_stretches = parts.reshape(-1, 1000).mean(axis=1)
    assert in_stretches == pytest.approx(np.full(8, 0.25), abs=1e-9)
    assert len({tuple(stretch) for stretch in parts.reshape(-1, 1000)}) == 8, "each in an order of its own"


def test_a_mixed_pass_takes_each_example_as_often_as_it_counts() -> None:
    mixture = Mixture((10, 6), 4, 2, (1, 3), homogeneous=False)
    assert mixture.per_pass == 7
    found = Counter(each for batch in drawn(mixture, 0, 7) for each in batch)
    assert found == Counter({**{(0, row): 1 for row in range(10)}, **{(1, row): 3 for row in range(6)}})


@pytest.mark.parametrize("homogeneous", [True, False])
def test_processes_share_the_stream(homogeneous: bool) -> None:
    """Two processes' batches of a step are of one set, and together they take every row once before any twice."""
    mixture = Mixture((16, 16), 4, 0, homogeneous=homogeneous, world=2)
    made = drawn(mixture, 0, 400)
    if homogeneous:
        for step in range(200):
            assert len({part for batch in made[2 * step : 2 * step + 2] for part, _ in batch}) == 1
    for start in range(0, 400, 8):  # 32 examples
        if not homogeneous:
            assert len({each for batch in made[start : start + 8] for each in batch}) == 32
    for part in range(2):
        rows = [row for batch in made for other, row in batch if other == part]
        assert all(sorted(rows[start : start + 16]) == list(range(16)) for start in range(0, len(rows) - 15, 16))


def test_sets_smaller_than_a_batch_are_repeated() -> None:
    batch = Mixture((2, 50), 5, 0, mixing=0.0).batch
    rows = [batch(number)[0].rows.tolist() for number in range(40) if batch(number)[0].set == 0]
    assert all(sorted(set(each)) == [0, 1] and len(each) == 5 for each in rows)
