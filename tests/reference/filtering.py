"""The slow, obvious twins of filters: each document looked at by itself, each search made in full and then thinned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda one, other: one == other,
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
}


def same_type(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return isinstance(one, bool) and isinstance(other, bool)
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    return isinstance(one, int | float) and isinstance(other, int | float)


def fits(metadata: Mapping[str, Any], field: str, sign: str, values: Sequence[Any]) -> bool:
    """One condition on one document, for a field that is no path."""
    held = metadata.get(field)
    held = held if isinstance(held, list) else [held]
    pairs = [(one, other) for one in held for other in values if same_type(one, other)]
    if sign == "!=":
        return bool(pairs) and all(one != other for one, other in pairs)
    return any(COMPARISONS["=" if sign == "in" else sign](one, other) for one, other in pairs)


def thinned(positions: Sequence[int], allowed: Sequence[bool], top_k: int) -> list[int]:
    """The first `top_k` allowed ones of the hits of a search that returned every hit."""
    return [position for position in positions if position >= 0 and allowed[position]][:top_k]
