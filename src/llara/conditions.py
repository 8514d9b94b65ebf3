"""Conditions on the metadata of documents, such as `year>=2020` or `lang in de,en`: read from text, never run as code.

    FIELD = VALUE    FIELD != VALUE    FIELD < VALUE    <=    >    >=    FIELD in VALUE,VALUE

A field is named as it stands in the document; `a.b` also names the field `b` of an object in the field `a`. A value is
a number, `true` or `false`, or else a text; between quotation marks it is always a text. Numbers compare with numbers
and texts with texts, by code points. Where a field holds a list, one of its values must fit, and for `!=` none may be
equal. A document that lacks the field, or has nothing of the value's type there, fits no condition on it.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llara.errors import ConfigError

Scalar = str | int | float | bool
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_QUOTED = r'"(?:[^"\\]|\\.)*"|' + r"'[^']*'"
_CONDITION = re.compile(
    rf"\s*({_QUOTED}|[^\s=!<>\"']+)\s*(==|<=|>=|!=|=|<|>|(?<=\s)in(?=[\s(\[]))\s*(.*?)\s*", re.DOTALL
)
_ITEM = re.compile(rf"\s*({_QUOTED}|[^,\"']*?)\s*(?:,|$)", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_BOOLEANS = {"true": True, "false": False}
_FORMS = "FIELD=VALUE, !=, <, <=, >, >=, or FIELD in VALUE,VALUE"


@dataclass(frozen=True)
class Condition:
    """One condition: `text` is how it was written, `values` are what the field is compared with, one but for `in`."""

    text: str
    field: str
    operator: str
    values: tuple[Scalar, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its values are: `text`, `a number`, `true or false`."""
        return tuple(dict.fromkeys(map(kind_of, self.values)))

    def comparable(self, found: Sequence[Scalar]) -> list[Scalar]:
        """Returns those values of a field that are of a type to compare with."""
        kinds = self.kinds
        return [value for value in found if kind_of(value) in kinds]

    def holds(self, found: Sequence[Scalar]) -> bool:
        """Tells whether a document fits whose field has these comparable values; none fit nothing."""
        if self.operator in _ORDER:
            return any(_ORDER[self.operator](value, self.values[0]) for value in found)
        equal = [_key(value) in map(_key, self.values) for value in found]
        return bool(found) and not any(equal) if self.operator == "!=" else any(equal)


def kind_of(value: Scalar) -> str:
    """Returns the type of a value in words."""
    if isinstance(value, bool):
        return "true or false"
    return "text" if isinstance(value, str) else "a number"


def _key(value: Scalar) -> tuple[str, Scalar]:
    return kind_of(value), value  # to Python, True equals 1


def values_of(metadata: Mapping[str, Any], field: str) -> list[Scalar]:
    """Returns the values of a field, one or those of a list; none where it is missing, null, or an object."""
    if field not in metadata:
        head, dot, rest = field.partition(".")
        inner = metadata.get(head) if dot else None
        return values_of(inner, rest) if isinstance(inner, Mapping) else []
    found = metadata[field]
    return [value for value in (found if isinstance(found, list) else [found]) if isinstance(value, Scalar)]


def parse_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Returns the conditions that texts state.

    Raises:
        ConfigError: What is wrong with each that states none.
    """
    conditions, problems = [], []
    for text in texts:
        try:
            conditions.append(_parse(text))
        except ValueError as error:
            problems.append(f"--filter: {text!r}: {error}")
    if problems:
        raise ConfigError(problems)
    return tuple(conditions)


def condition_problems(texts: Sequence[str]) -> list[str]:
    """Returns what is wrong with texts that should state conditions."""
    try:
        parse_conditions(texts)
    except ConfigError as error:
        return list(error.problems)
    return []


def _parse(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ValueError(f"is no condition; write {_FORMS}, and a name with blanks or such signs between quotes")
    name, sign, value = match.groups()
    if sign == "==":
        raise ValueError("write = for ==")
    field = str(_scalar(name)) if name[0] in "\"'" else name
    values = tuple(_list(value)) if sign == "in" else (_scalar(value),)
    if sign in _ORDER and isinstance(values[0], bool):
        raise ValueError("true and false have no order; write = or !=")
    return Condition(text.strip(), field, sign, values)


def _list(text: str) -> list[Scalar]:
    if text[:1] in ("[", "("):
        if text[-1] != {"[": "]", "(": ")"}[text[0]]:
            raise ValueError(f"its list opens with {text[0]} and does not close")
        text = text[1:-1]
    items: list[Scalar] = []
    at = 0
    while at < len(text) or text[at - 1 : at] == "," or not items:
        match = _ITEM.match(text, at)
        if match is None:
            raise ValueError(f"its list cannot be read from {text[at:]!r} on; quote values that hold commas or quotes")
        items.append(_scalar(match[1]))
        if match.end() == at:
            break
        at = match.end()
    return items


def _scalar(text: str) -> Scalar:
    if not text:
        raise ValueError('has no value; "" is the empty text')
    if text[0] in "\"'":
        return _unquoted(text)
    if text[0] in "=<>!":
        raise ValueError(f"{text} begins with a sign of comparison; quote it if it is meant as text")
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if not _NUMBER.fullmatch(text):
        return text
    number: int | float = json.loads(text)
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{text} is larger than any number")
    return number


def _unquoted(text: str) -> str:
    if not re.fullmatch(_QUOTED, text, re.DOTALL):
        raise ValueError(f"{text} opens a quotation and does not end with it")
    if text[0] == "'":
        return text[1:-1]
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{text} is no text between quotes: {error}") from None
