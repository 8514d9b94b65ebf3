"""Splits that are fixed in code: they depend on the text alone, not on the order of rows, a seed, or the machine."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from llara.data.lines import digest

Split = Literal["train", "dev", "test"]
T = TypeVar("T")

TRAIN_SHARE, DEV_SHARE = 0.8, 0.1  # the rest is test
DEV_QUERY_SHARE = 0.2


def normalise(text: str) -> str:
    """Returns a text in the form in which two are called the same: case and white space do not count."""
    return " ".join(text.casefold().split())


def split_by_focus(focus: str) -> Split:
    """Returns the split of a labelled pair by what it is about: 80/10/10.

    Not by row: MedQuAD asks the same things about each disease, and a random split leaves 85 % of the test rows with
    their focus in train. Pairs without focus are one group.
    """
    return _split("focus", normalise(focus))


def split_by_module(module: str) -> Split:
    """Returns the split of a documentation string by the module it stands in: 80/10/10."""
    return _split("module", module)


def is_dev_query(query_id: str) -> bool:
    """Tells whether a training query is held out for dev, for collections that come without a dev split: 20 %."""
    return _fraction("dev", query_id) < DEV_QUERY_SHARE


def drop_shared(rows: Sequence[T], keys: Sequence[Callable[[T], str]]) -> list[T]:
    """Returns the rows that share no key, normalised, with any other row; of rows that share one, none is kept.

    Keeping one of them would still let a test row be answered by a copy seen in training.
    """
    columns = [[digest(normalise(key(row)).encode()) for row in rows] for key in keys]
    counts = [Counter(column) for column in columns]
    return [
        row
        for row, *values in zip(rows, *columns, strict=True)
        if all(count[value] == 1 for count, value in zip(counts, values, strict=True))
    ]


def _split(salt: str, key: str) -> Split:
    fraction = _fraction(salt, key)
    if fraction < TRAIN_SHARE:
        return "train"
    return "dev" if fraction < TRAIN_SHARE + DEV_SHARE else "test"


def _fraction(salt: str, key: str) -> float:
    """Returns a number in [0, 1) that is fixed for the key; the salt keeps the splits independent of each other."""
    checksum = hashlib.blake2b(key.encode(), digest_size=8, person=salt.encode()).digest()
    return int.from_bytes(checksum, "big") / 2**64
