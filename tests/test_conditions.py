"""Conditions on metadata: what they are read as, what they say of a document, and what is no condition."""

import itertools
from typing import Any

import pytest

from llara.conditions import condition_problems, parse_conditions, values_of
from llara.errors import ConfigError
from tests.reference.filtering import fits


def parse(text: str) -> Any:
    (condition,) = parse_conditions([text])
    return condition


def holds(text: str, metadata: dict[str, Any]) -> bool:
    condition = parse(text)
    return condition.holds(condition.comparable(values_of(metadata, condition.field)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("year>=2020", ("year", ">=", (2020,))),
        (" year  <  -1.5e3 ", ("year", "<", (-1500.0,))),
        ("lang=en", ("lang", "=", ("en",))),
        ("lang != en", ("lang", "!=", ("en",))),
        ('id="007"', ("id", "=", ("007",))),
        ("id=007", ("id", "=", ("007",))),  # no number to JSON either
        ('x=""', ("x", "=", ("",))),
        ("x=a, b", ("x", "=", ("a, b",))),
        ("x=true", ("x", "=", (True,))),
        ("x='it is'", ("x", "=", ("it is",))),
        (r'x="a \"b\" ü\n"', ("x", "=", ('a "b" ü\n',))),
        ("date>=2020-01-31", ("date", ">=", ("2020-01-31",))),
        ("lang in de,en", ("lang", "in", ("de", "en"))),
        ("lang in [\"a, b\", 'c', 3, true]", ("lang", "in", ("a, b", "c", 3, True))),
        ("n in (1)", ("n", "in", (1,))),
        ("in in in", ("in", "in", ("in",))),
        ("made_in=China", ("made_in", "=", ("China",))),
        ('"a name">1', ("a name", ">", (1,))),
        ("'a=b'=c", ("a=b", "=", ("c",))),
        ("n=" + "9" * 400, ("n", "=", (int("9" * 400),))),
    ],
)
def test_what_is_written_is_what_is_read(text: str, read: tuple[Any, ...]) -> None:
    condition = parse(text)
    assert (condition.field, condition.operator, condition.values) == read
    assert list(map(type, condition.values)) == list(map(type, read[2]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no condition"),
        ("year", "is no condition; write FIELD=VALUE, !=, <"),
        (">5", "is no condition"),
        ("a name=5", "a name with blanks or such signs between quotes"),
        ("year=", 'has no value; "" is the empty text'),
        ("lang in ", "has no value"),
        ("lang in de,", "has no value"),
        ("lang in de,,en", "has no value"),
        ("lang in [de", "opens with [ and does not close"),
        ('lang in "de', "cannot be read from '\"de' on"),
        ("a==b", "write = for =="),
        ("a=>5", ">5 begins with a sign of comparison"),
        ('a="b"c', "opens a quotation and does not end with it"),
        (r'a="\x"', "is no text between quotes"),
        ("a<true", "true and false have no order"),
        ("a=1e999", "1e999 is larger than any number"),
        ("__import__('os').system('true')", "is no condition"),
    ],
)
def test_what_is_no_condition_is_named(text: str, said: str) -> None:
    (problem,) = condition_problems([text])
    assert problem.startswith(f"--filter: {text!r}: ") and said in problem


def test_all_problems_at_once() -> None:
    assert len(condition_problems(["a", "b=1", "c"])) == 2
    with pytest.raises(ConfigError) as caught:
        parse_conditions(["a", "b=1", "c"])
    assert len(caught.value.problems) == 2


VALUES = [0, 1, 2, 1.0, 2.5, -1, "1", "", "b", "ä", True, False, None, [], [1, "b"], [2, 3], ["b", None], {"a": 1}]
WANTED = [0, 1, 2.5, "1", "b", "", True]


@pytest.mark.parametrize("sign", ["=", "!=", "<", "<=", ">", ">="])
def test_a_condition_says_what_its_slow_twin_says(sign: str) -> None:
    seen = set()
    for held, wanted in itertools.product(VALUES, WANTED):
        if isinstance(wanted, bool) and sign not in ("=", "!="):
            continue
        written = f'"{wanted}"' if isinstance(wanted, str) else str(wanted).lower()
        said = holds(f"x{sign}{written}", {"x": held, "y": 1})
        assert said == fits({"x": held, "y": 1}, "x", sign, [wanted]), (held, sign, wanted)
        seen.add(said)
    assert seen == {True, False}


def test_a_list_says_what_its_slow_twin_says() -> None:
    for held, pair in itertools.product(VALUES, itertools.permutations(WANTED, 2)):
        written = ",".join(f'"{each}"' if isinstance(each, str) else str(each).lower() for each in pair)
        assert holds(f"x in {written}", {"x": held}) == fits({"x": held}, "x", "in", pair), (held, pair)


def test_a_missing_field_fits_nothing() -> None:
    assert not any(holds(f"x{sign}1", {"y": 1}) for sign in ("=", "!=", "<", "<=", ">", ">=", " in "))


def test_a_dot_leads_into_an_object_unless_it_is_part_of_the_name() -> None:
    assert holds("a.b=1", {"a": {"b": 1}}) and holds("a.b.c=1", {"a": {"b": {"c": [1]}}})
    assert holds("a.b=2", {"a": {"b": 1}, "a.b": 2})
    assert not holds("a.b=1", {"a": [1]}) and not holds("a.b=1", {"b": 1})
