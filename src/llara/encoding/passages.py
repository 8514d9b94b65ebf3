"""Long documents as passages: a text that is longer than a model reads is cut, and each piece has its vector.

A passage ends with the last sentence that fits. Where that would leave it short, it ends with the last line, else with
the last word, and a word that is longer than a passage is cut. The title stands before each of them. What fits into one
passage is one, and has the vector that it has without any cutting.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

from llara.data.sentences import End, line_ends, sentence_ends
from llara.errors import ConfigError, ModelError
from llara.records import Document
from llara.templates import BoundTemplate

SHARE = 4  # a passage is at least this part of the longest one, but the last; a title takes at most half of it
CHARACTERS = 8  # per token, of the text that is looked at first; twice as many, where that was too little
_BLANKS = regex.compile(r"\s+")


class Span(NamedTuple):
    """One passage: characters `start` to `stop` (exclusive) of the document's text."""

    start: int
    stop: int


class Cut(NamedTuple):
    """Documents as passages.

    Attributes:
        texts: Of the passages, document by document.
        titles: Theirs.
        table: int64 [passages, 3]: the number of the document among those that were cut, and the characters of its
            text where the passage starts and stops.
    """

    texts: list[str]
    titles: list[str]
    table: NDArray[np.int64]


class Cutter:
    """Cuts documents into passages.

    Args:
        template: The model's, with its tokenizer.
        join_title: How a title meets its text.
        length: Tokens of a passage at most, prompt included.
        overlap: Tokens of a passage that stand in the one before, too, at most.

    Raises:
        ConfigError: The length leaves no room for text, or less than the overlap asks for.
        ModelError: The tokenizer does not say where in a text its tokens stand.
    """

    def __init__(
        self, template: BoundTemplate, join_title: Callable[[str, str], str], length: int, overlap: int = 0
    ) -> None:
        template.wrap([], "passage", length)
        side = template.passage
        self._tokenizer: Any = template.tokenizer
        self._prefix, self._join_title, self.overlap = side.joint_prefix, join_title, overlap
        self.room = length - len(side.prefix) - len(side.suffix)
        most = self.room // SHARE
        if overlap > most:
            raise ConfigError(f"--overlap: at most a quarter of a passage's {self.room} tokens, which is {most}")
        if not getattr(self._tokenizer, "is_fast", False):
            raise ModelError("--long cut: the tokenizer does not say where its tokens stand; use --long truncate")

    def cut(self, documents: Sequence[Document]) -> Cut:
        """Returns the passages of documents, in their order; each document has one or more."""
        texts: list[str] = []
        titles: list[str] = []
        table: list[tuple[int, int, int]] = []
        for number, document in enumerate(documents):
            title, spans = self.spans(document)
            texts += [document.text[span.start : span.stop] for span in spans]
            titles += [title] * len(spans)
            table += [(number, *span) for span in spans]
        return Cut(texts, titles, np.array(table, np.int64).reshape(-1, 3))

    def spans(self, document: Document) -> tuple[str, list[Span]]:
        """Returns the title that stands before each passage, and where the passages are in the text."""
        title, text = document.title, document.text
        if not text.strip() or self._fits(self._head(title), text):
            return title, [Span(0, len(text))]
        title = self._short(title)
        return title, list(_Walk(self, self._head(title), text).spans())

    def starts(self, head: str, text: str) -> list[int]:
        """Returns where each token starts of a text behind `head`, counted from the start of the text."""
        encoded = self._tokenizer(
            [head + text],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
            verbose=False,
        )
        offsets = np.asarray(encoded["offset_mapping"][0], np.int64).reshape(-1, 2)
        # Offsets step back where a normaliser has moved characters; an end is then taken late rather than early.
        found: list[int] = (np.maximum.accumulate(offsets[:, 0]) - len(head)).tolist()
        return found

    def window(self, head: str, text: str, start: int) -> list[int]:
        """Returns `starts` of the text from `start` on: of all of it, or of more than fits into a passage."""
        size = CHARACTERS * self.room
        while True:
            found = self.starts(head, text[start : start + size])
            if len(found) > self.room or start + size >= len(text):
                return found
            size *= 2

    def _fits(self, head: str, text: str) -> bool:
        return len(self.window(head, text, 0)) <= self.room

    def _head(self, title: str) -> str:
        """Returns what stands before the text of a passage."""
        return self._prefix + self._join_title(title, "x")[:-1]

    def _short(self, title: str) -> str:
        """Returns a title, or of one that takes more than half of a passage as much as fits into that half."""
        starts, most = self.starts(self._prefix, title), self.room // 2
        return title if len(starts) <= most else title[: max(starts[most], 0)].rstrip()


class _Walk:
    """The way through one text that takes more than one passage."""

    def __init__(self, cutter: Cutter, head: str, text: str) -> None:
        self.cutter, self.head, self.text = cutter, head, text
        self.end = len(text.rstrip())
        self.sentences, self.lines = sentence_ends(text), line_ends(text)

    def spans(self) -> Iterator[Span]:
        start = done = 0
        while start < self.end:
            tokens = self.cutter.window(self.head, self.text, start)
            if len(tokens) <= self.cutter.room:
                yield Span(start, self.end)
                return
            stop, following = self._stop(tokens, start, done)
            yield Span(start, stop)
            start, done = self._back(tokens, start, stop, following), stop

    def _stop(self, tokens: list[int], start: int, done: int) -> tuple[int, int]:
        """Returns where the passage stops that begins at `start`, and where what follows it begins.

        `tokens` are where its tokens start, from `start` on. It stops behind `done`, where the one before did.
        """
        longest = self.cutter.room
        while True:
            stop, following = self._place(tokens, start, done, longest)
            # Tokens at the end may differ from those in the midst of a text: what does not fit is cut shorter.
            if longest <= 1 or len(self.cutter.starts(self.head, self.text[start:stop])) <= self.cutter.room:
                return stop, following
            longest -= 1

    def _place(self, tokens: list[int], start: int, done: int, longest: int) -> tuple[int, int]:
        before = bisect_left(tokens, 0)  # those of what stands before the text
        carried = max(bisect_left(tokens, done - start) - before, 0)
        least = before + carried + max(1, (longest - before) // SHARE)
        full = start + max(tokens[longest], done - start + 1, 1)
        for ends in (self._between(self.sentences, start, full), self._between(self.lines, start, full)):
            for end in reversed(ends):
                if least <= bisect_left(tokens, end.stop - start) <= longest:
                    return end.stop, end.start
        for end in reversed(_word_ends(self.text, start, full)):
            if least <= bisect_left(tokens, end.stop - start) <= longest:
                return end.stop, end.start
        return full, full

    def _back(self, tokens: list[int], start: int, stop: int, following: int) -> int:
        """Returns where the next passage begins: where `overlap` tokens of this one are left, at a sentence or word."""
        if not self.cutter.overlap:
            return following
        count = bisect_left(tokens, stop - start)
        for ends in (self._between(self.sentences, start, stop), _word_ends(self.text, start, stop)):
            for end in ends:
                if end.start < stop and count - bisect_left(tokens, end.stop - start) <= self.cutter.overlap:
                    return end.start
        return following

    @staticmethod
    def _between(ends: list[End], start: int, stop: int) -> list[End]:
        """Returns the ends that stop behind `start`, and not behind `stop`."""
        first, last = (bisect_right(ends, place, key=lambda end: end.stop) for place in (start, stop))
        return ends[first:last]


def _word_ends(text: str, start: int, stop: int) -> list[End]:
    """Returns where words end, behind `start` and not behind `stop`, and another follows."""
    found = (End(match.start(), match.end()) for match in _BLANKS.finditer(text, start))
    return [end for end in takewhile(lambda end: end.stop <= stop, found) if end.stop > start and end.start < len(text)]
