"""The slow, obvious twin of the shared-prefix mask: one cell at a time."""

from collections.abc import Sequence


def kinds(text: int, own: int, other: int, width: int, padding: str) -> list[str]:
    """What stands at each position of a row: text, self, next or pad."""
    row = ["text"] * text + ["self"] * own + ["next"] * other
    filler = ["pad"] * (width - len(row))
    return filler + row if padding == "left" else row + filler


def sees(row: Sequence[str], i: int, j: int) -> bool:
    """Whether position i may see position j."""
    if i == j:
        return True
    if j > i or "pad" in (row[i], row[j]):
        return False
    return row[j] in ("text", row[i])


def mask(row: Sequence[str]) -> list[list[bool]]:
    return [[sees(row, i, j) for j in range(len(row))] for i in range(len(row))]


def position_ids(row: Sequence[str]) -> list[int]:
    """Each branch goes on right after the text; padding counts nothing."""
    text, positions = row.count("text"), []
    for column, kind in enumerate(row):
        before = row[:column].count(kind)
        positions.append({"text": before, "self": text + before, "next": text + before, "pad": 0}[kind])
    return positions


def end(row: Sequence[str], kind: str) -> int:
    """One past the last position of a kind."""
    return max(column for column, each in enumerate(row) if each == kind) + 1


def windowed(row: Sequence[str], window: int) -> list[list[bool]]:
    """As `mask`, and nothing further back than the window, counted in position ids."""
    ids = position_ids(row)
    return [[seen and ids[i] - ids[j] < window for j, seen in enumerate(line)] for i, line in enumerate(mask(row))]


def packed(texts: Sequence[int], own: int, other: int, width: int) -> list[list[bool]]:
    """Several texts in one row: each text's own mask, and nothing between them; padding is a text by itself."""
    rows = [mask(kinds(text, own, other, text + own + other, "right")) for text in texts]
    used = sum(map(len, rows))
    rows.append([[j <= i for j in range(width - used)] for i in range(width - used)])
    whole = [[False] * width for _ in range(width)]
    begin = 0
    for row in rows:
        for i, line in enumerate(row):
            whole[begin + i][begin : begin + len(row)] = line
        begin += len(row)
    return whole
