"""Splits: fixed, of the right size, and without shared text."""

from collections import Counter

from llara.data.splits import drop_shared, is_dev_query, normalise, split_by_focus, split_by_module


def test_splits_never_change() -> None:
    assert [split_by_focus(name) for name in ("Gout", "Stroke", "Asthma", "Measles", "Rabies", "")] == [
        "train",
        "train",
        "train",
        "train",
        "dev",
        "train",
    ]
    assert [split_by_module(name) for name in ("json.decoder", "email.message", "numpy.linalg", "ast", "re")] == [
        "train",
        "train",
        "train",
        "train",
        "train",
    ]
    assert [name for name in map(str, range(20)) if is_dev_query(name)] == ["8", "11"]


def test_case_and_space_of_a_focus_do_not_count() -> None:
    for number in range(200):
        assert split_by_focus(f"Focus {number}") == split_by_focus(f"  fOCUS\n{number} ")


def test_shares_are_80_10_10_and_20() -> None:
    for split in (split_by_focus, split_by_module):
        counts = Counter(split(f"key {number}") for number in range(20_000))
        assert abs(counts["train"] - 16_000) < 300
        assert abs(counts["dev"] - 2_000) < 200
        assert abs(counts["test"] - 2_000) < 200
    assert abs(sum(is_dev_query(str(number)) for number in range(20_000)) - 4_000) < 250


def test_splits_are_independent_of_each_other() -> None:
    both = Counter((split_by_focus(str(n)), split_by_module(str(n))) for n in range(20_000))
    assert abs(both["test", "test"] - 200) < 60


def test_drop_shared_keeps_no_copy_at_all() -> None:
    rows = [("a", "1"), ("A ", "2"), ("b", "3"), ("c", "3 "), ("d", "4"), ("e", "d")]
    assert drop_shared(rows, [lambda row: row[0], lambda row: row[1]]) == [("d", "4"), ("e", "d")]
    assert drop_shared(rows, [lambda row: row[1]]) == [("a", "1"), ("A ", "2"), ("d", "4"), ("e", "d")]
    assert drop_shared(rows, []) == rows
    assert drop_shared([], [normalise]) == []


def test_normalise() -> None:
    assert normalise("  Straße\n\t 2 ") == "strasse 2"
