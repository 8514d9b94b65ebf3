"""Numbers as files spell them: what the readers of judgements, runs and a teacher's scores take for one."""

import math
import re

_FLOAT32_END = 2.0**128 - 2.0**103  # from here on, rounding to float32 gives infinity
_WHOLE = re.compile(r"-?[0-9]{1,18}")  # more digits do not fit the 64 bits that measures are computed in
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def fits_float32(value: float) -> bool:
    """Tells whether a number is finite, also as float32, in which scores are kept and learned; not so NaN."""
    return abs(value) < _FLOAT32_END


def is_whole(text: str) -> bool:
    """Tells whether a text is a whole number in decimal digits, of at most 18."""
    return _WHOLE.fullmatch(text) is not None


def to_float(text: str) -> float:
    """Returns a decimal number; NaN for any other text, also for what Python alone takes for a number (`1_000`)."""
    return float(text) if _DECIMAL.fullmatch(text) else math.nan
