"""The slow, obvious twin of cutting: every end is tried, and what stands before it is tokenised each time anew."""

import re
from collections.abc import Callable

from llara.data.sentences import line_ends, sentence_ends

Ends = list[tuple[int, int]]


def cut(text: str, room: int, overlap: int, count: Callable[[str], int]) -> list[tuple[int, int]]:
    """Returns where the passages of a text start and stop; `count` tells the tokens of a piece with its title."""
    words = [(m.start(), m.end()) for m in re.finditer(r"\s+", text) if m.start() and m.end() < len(text)]
    kinds: list[Ends] = [[tuple(e) for e in sentence_ends(text)], [tuple(e) for e in line_ends(text)], words]  # type: ignore[misc]
    if count(text) <= room:
        return [(0, len(text))]
    end, start, done = len(text.rstrip()), 0, 0
    spans: list[tuple[int, int]] = []
    while start < end:
        if count(text[start:]) <= room:
            return [*spans, (start, end)]
        stop, following = _stop(text, start, done, room, kinds, count)
        spans.append((start, stop))
        start, done = following, stop
        if overlap:
            last = spans[-1]
            total = count(text[last[0] : last[1]])
            for ends in (kinds[0], kinds[2]):
                inside = [end for end in ends if last[0] < end[0] and end[1] < last[1]]
                inside = [end for end in inside if total - count(text[last[0] : end[0]]) <= overlap]
                if inside:
                    start = inside[0][1]
                    break
    return spans


def _stop(
    text: str, start: int, done: int, room: int, kinds: list[Ends], count: Callable[[str], int]
) -> tuple[int, int]:
    before = count("")
    carried = count(text[start:done]) - before if done > start else 0
    least = before + carried + max(1, (room - before) // 4)
    for ends in kinds:
        fitting = [end for end in ends if end[0] > start and least <= count(text[start : end[0]]) <= room]
        if fitting:
            return fitting[-1]
    stop = max(stop for stop in range(start + 1, len(text)) if count(text[start:stop]) <= room)
    return stop, stop
