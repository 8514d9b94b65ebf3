"""The slow, obvious twin of `data/sentences.py`: one position after the other, one rule of UAX #29 after the other."""

import functools
import itertools

import regex

BREAKS = "\r\n\x85\u2028\u2029"
NAMES = ("ST", "AT", "CL", "SC", "SP", "NU", "UP", "LO", "LE", "EX", "FO")


@functools.cache
def kind(char: str) -> str:
    """The sentence-break property of a character; NL for one that breaks a line."""
    if char in BREAKS:
        return "NL"
    return next((name for name in NAMES if regex.match(rf"\p{{SB={name}}}", char)), "other")


def opens(text: str, at: int) -> bool:
    """Whether a bracket or quotation mark can open, and stands right before a letter or digit."""
    follows = text[at + 1 : at + 2]
    return bool(regex.match(r"[\p{Ps}\p{Pi}]", text[at]) and regex.match(r"[\p{L}\p{N}]", follows))


def is_end(text: str, at: int) -> bool:
    """Whether a sentence ends before the character at `at`."""
    # SB5: what belongs to the character before it is not looked at, and nothing ends before it.
    if kind(text[at]) in ("EX", "FO"):
        return False
    before = [(kind(text[i]), i) for i in range(at) if i == 0 or kind(text[i]) not in ("EX", "FO")]
    after = [(kind(text[i]), i) for i in range(at, len(text)) if i == at or kind(text[i]) not in ("EX", "FO")]
    kinds = [each for each, _ in before]
    # Nothing ends within white space.
    if after[0][0] in ("SP", "NL"):
        return False
    space = len(kinds)
    while space and kinds[space - 1] in ("SP", "NL"):
        space -= 1
    spaces = "".join(text[i] for _, i in before[space:])
    lines = len(regex.findall(r"\r\n|[\r\n\x85\u2028\u2029]", spaces))
    if lines > 1 or "\u2029" in spaces:
        return True  # SB4, of blank lines
    close = space
    while close and kinds[close - 1] == "CL" and not opens(text, before[close - 1][1]):
        close -= 1
    if not close or kinds[close - 1] not in ("ST", "AT"):
        return False
    if space == len(kinds) and after[0][0] == "CL" and not opens(text, after[0][1]):
        return False  # SB9
    if after[0][0] in ("SC", "ST", "AT"):
        return False  # SB8a
    if kinds[close - 1] == "ST":
        return True
    stop = before[close - 1][1]
    if stop and kind(text[stop - 1]) == "UP" and not regex.match(r"[\p{L}\p{M}\p{N}]", text[stop - 2 : stop - 1]):
        return False  # an initial
    if close == len(kinds) and after[0][0] == "NU":
        return False  # SB6
    if close == len(kinds) and after[0][0] == "UP" and close > 1 and kinds[close - 2] in ("UP", "LO"):
        return False  # SB7
    letter = next((each for each, _ in after if each in ("LE", "UP", "LO", "NL", "ST", "AT")), "")
    return letter != "LO"  # SB8


def sentences(text: str) -> list[str]:
    """The parts of a text; white space before the first sentence belongs to it."""
    starts = [0, *(at for at in range(1, len(text)) if text[:at].strip() and is_end(text, at)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(starts)]
