"""Where sentences end, in any language: Unicode's rules for sentence boundaries, told by the properties of characters.

The rules are SB3 to SB11 of UAX #29, section 5, with three changes. A single line break is white space, as it is in
text of a fixed width; only a blank line or U+2029 ends a paragraph. A bracket or quotation mark that can open, right
before a letter, does open: Chinese and Japanese have no space before it. And a full stop after a single capital letter
abbreviates ("J. Smith", "U.S. Army"): an end too few does less harm here than one too many. The rules know no other
abbreviations, so "Dr. Who" has an end in it; in return they need to know no language.
"""

from typing import NamedTuple

import regex

# SB=ST: ? ! and the full stops of most scripts; AT: the full stop, which also abbreviates; CL: brackets and quotation
# marks; SC: punctuation inside a sentence; SP: white space; SE: line breaks beside CR and LF; NU: digits; UP, LO, LE:
# letters; EX, FO: what belongs to the character before it.
_MARKS = r"[\p{SB=EX}\p{SB=FO}]*+"
_LINE = r"(?:\r\n|[\r\n\p{SB=SE}])"
_BLANKS = rf"(?:\p{{SB=SP}}{_MARKS})*+"
_SPACES = rf"(?:[\r\n\p{{SB=SE}}\p{{SB=SP}}]{_MARKS})*+"
_CLOSING = rf"(?:(?![\p{{Ps}}\p{{Pi}}][\p{{L}}\p{{N}}])\p{{SB=CL}}{_MARKS})*+"
_SENTENCE = regex.compile(
    # The first character comes from one set: what is no candidate is passed over fast.
    rf"""
    [\p{{SB=ST}}\p{{SB=AT}}\r\n\p{{SB=SE}}]
    (?: (?<= \u2029 ) {_SPACES}                                                                  # SB4
      | (?<= [\r\n\p{{SB=SE}}] ) (?: (?<=\r)\n )?+ {_BLANKS} {_LINE} {_SPACES}                     # SB4: a blank line
      | (?: (?<= \p{{SB=ST}} ) {_MARKS}
          | (?<= \p{{SB=AT}} ) (?<! (?<! [\p{{L}}\p{{M}}\p{{N}}] ) \p{{SB=UP}} . ) {_MARKS}             # J. Smith
            (?! \p{{SB=NU}} )                                                                    # SB6: 3.4
            (?! \p{{SB=UP}} (?<= [\p{{SB=UP}}\p{{SB=LO}}] {_MARKS[:-1]} \p{{SB=AT}} {_MARKS[:-1]} . ) )  # SB7: U.S.
            (?! {_CLOSING} {_SPACES}                                                             # SB8: etc., e.g. so
                [^\p{{SB=LE}}\p{{SB=UP}}\p{{SB=LO}}\p{{SB=ST}}\p{{SB=AT}}\p{{SB=SE}}\r\n]*+ \p{{SB=LO}} )
        )
        {_CLOSING} {_SPACES}                                                                     # SB9 to SB11
        (?! [\p{{SB=SC}}\p{{SB=ST}}\p{{SB=AT}}] )                                                # SB8a: ?!
    )
    """,
    regex.VERBOSE,
)
_LINE_BREAK = regex.compile(rf"[\r\n\p{{SB=SE}}]{_SPACES}")


class End(NamedTuple):
    """An end inside a text: where what ends stops, and where the next begins; between them is white space alone."""

    stop: int
    start: int


def sentence_ends(text: str) -> list[End]:
    """Returns where sentences end and another follows, in order; not the end of the text."""
    return _find(_SENTENCE, text)


def line_ends(text: str) -> list[End]:
    """Returns where lines end and another follows, in order: places to part a text that has no sentences."""
    return _find(_LINE_BREAK, text)


def _find(pattern: "regex.Pattern[str]", text: str) -> list[End]:
    ends = []
    for match in pattern.finditer(text):
        stop = start = match.end()
        while stop and text[stop - 1].isspace():
            stop -= 1
        if stop and start < len(text):
            ends.append(End(stop, start))
    return ends
