"""The slow, obvious twin of `training/chunks.py`: one document at a time, one token at a time."""

from collections.abc import Sequence


def cut_document(tokens: Sequence[int], chunk_length: int, min_length: int) -> list[tuple[list[int], list[int]]]:
    """Returns (text, next text) of every chunk of one document that is long enough."""
    pieces: list[list[int]] = []
    for position, token in enumerate(tokens):
        if position % chunk_length == 0:
            pieces.append([])
        pieces[-1].append(token)
    chunks = []
    for number, piece in enumerate(pieces):
        following = pieces[number + 1] if number + 1 < len(pieces) else []
        if len(piece) >= min_length:
            chunks.append((piece, following))
    return chunks
