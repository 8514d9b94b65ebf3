"""The slow, obvious twin of `training/cutting.py` and `training/prepare.py`: one document, one token at a time."""

from collections.abc import Collection, Sequence


def cut_document(
    tokens: Sequence[int],
    chunk_length: int,
    min_length: int,
    sentences: Collection[int] = (),
    lines: Collection[int] = (),
) -> list[tuple[list[int], list[int]]]:
    """Returns (text, next text) of every chunk of one document that is long enough.

    `sentences` and `lines` say after how many tokens a sentence, or a line, ends.
    """
    pieces: list[list[int]] = []
    done = 0
    while len(tokens) - done > chunk_length:
        take = chunk_length
        for ends in (lines, sentences):  # the one that is tried last wins
            for length in range(max(min_length, 1), chunk_length + 1):
                if done + length in ends and max(e for e in ends if e <= done + chunk_length) == done + length:
                    take = length
        pieces.append(list(tokens[done : done + take]))
        done += take
    pieces.append(list(tokens[done:]))
    chunks = []
    for number, piece in enumerate(pieces):
        following = pieces[number + 1] if number + 1 < len(pieces) else []
        if len(piece) >= max(min_length, 1):
            chunks.append((piece, following))
    return chunks
