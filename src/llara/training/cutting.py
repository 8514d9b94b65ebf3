"""From texts to token ids and chunks: where a document's tokens may be cut, and where they are."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llara.data.sentences import End, line_ends, sentence_ends

# A longer text is tokenised in parts that end with a sentence: a tokenizer takes hundreds of bytes per token.
MAX_CHARACTERS = 2**18
Ids = npt.NDArray[np.int64]


class Tokens(NamedTuple):
    """A text's token ids, int64 [n], and how many of them stand before the end of each sentence, and of each line."""

    ids: Ids
    sentences: list[int]
    lines: list[int]


class Part(NamedTuple):
    """A piece of a text that is tokenised by itself, with the ends inside it."""

    text: str
    sentences: list[End]
    lines: list[End]


def parts_of(text: str, *, sentences: bool, longest: int = MAX_CHARACTERS) -> list[Part]:
    """Cuts a text into parts of at most `longest` characters, after the last sentence, else the last line, that fits.

    A part whose first sentence and line are longer still ends with `longest` characters. White space after an end goes
    to the next part, where tokenizers join it to the word. Where `sentences` is False, the ends inside the parts are
    left out.
    """
    if not sentences and len(text) <= longest:
        return [Part(text, [], [])]
    ends, lines = sentence_ends(text), line_ends(text)
    cuts = cut(len(text), [end.stop for end in ends], [end.stop for end in lines], longest, 1)
    inside = [_between(found if sentences else [], cuts) for found in (ends, lines)]
    pieces = itertools.pairwise(cuts)
    return [Part(text[start:stop], *within) for (start, stop), *within in zip(pieces, *inside, strict=True)]


def sentences_of(text: str) -> list[Part]:
    """Cuts a text into its sentences, for a tokenizer that cannot say where in a text its tokens stand."""
    starts = [0, *(end.stop for end in sentence_ends(text)), len(text)]
    return [Part(text[start:stop], [], []) for start, stop in itertools.pairwise(starts)]


def tokenise(parts: Sequence[Part], tokenizer: Any) -> list[Tokens]:
    """Returns the tokens of each part by itself: no special token is added, and none that a text spells is one."""
    if not parts:
        return []
    placed = any(part.sentences or part.lines for part in parts)
    encoded = tokenizer(
        [part.text for part in parts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=placed,
        split_special_tokens=True,
        verbose=False,
    )
    ids = [np.asarray(row, dtype=np.int64) for row in encoded["input_ids"]]
    if not placed:
        return [Tokens(row, [], []) for row in ids]
    found = []
    for part, row, offsets in zip(parts, ids, encoded["offset_mapping"], strict=True):
        # Offsets step back where a normaliser has moved characters; an end is then taken late rather than early.
        starts = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0])
        found.append(Tokens(row, _positions(part.sentences, starts), _positions(part.lines, starts)))
    return found


def join(parts: Sequence[Tokens]) -> Tokens:
    """Returns the tokens of a text from those of its parts; each part ends a sentence."""
    if len(parts) == 1:
        return parts[0]
    sentences: list[int] = []
    lines: list[int] = []
    count = 0
    for part in parts:
        sentences += [count + end for end in part.sentences]
        lines += [count + end for end in part.lines]
        count += len(part.ids)
        sentences.append(count)
    return Tokens(np.concatenate([np.empty(0, dtype=np.int64), *(part.ids for part in parts)]), sentences, lines)


def cut(count: int, sentences: Sequence[int], lines: Sequence[int], longest: int, shortest: int) -> list[int]:
    """Returns where a text of `count` tokens is cut, from 0 to `count`; no piece is longer than `longest`.

    A piece goes to the last end of a sentence that fits; where that leaves fewer than `shortest`, to the last end of a
    line; where that does, too, it is `longest`. `sentences` and `lines` are sorted.
    """
    cuts = [0]
    while count - cuts[-1] > longest:
        full = cuts[-1] + longest
        candidates = (_last(sentences, full), _last(lines, full))
        cuts.append(next((end for end in candidates if end - cuts[-1] >= max(shortest, 1)), full))
    return [*cuts, count]


def _last(ends: Sequence[int], limit: int) -> int:
    place = bisect_right(ends, limit)
    return ends[place - 1] if place else 0


def _between(ends: Sequence[End], cuts: Sequence[int]) -> list[list[End]]:
    """Returns the ends inside each piece, counted from its start."""
    pieces: list[list[End]] = [[] for _ in cuts[1:]]
    for end in ends:
        piece = bisect_right(cuts, end.stop) - 1
        if end.stop > cuts[piece]:
            pieces[piece].append(End(end.stop - cuts[piece], end.start - cuts[piece]))
    return pieces


def _positions(ends: Sequence[End], starts: Ids) -> list[int]:
    """Returns how many tokens stand before each end, given where each token starts, int64 [n].

    A token that holds what stands on both sides of an end belongs before it, white space after it.
    """
    counts = np.searchsorted(starts, np.array([end.stop for end in ends], dtype=np.int64), side="left")
    return [count for count in np.unique(counts).tolist() if 0 < count < len(starts)]
