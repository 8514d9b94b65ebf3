"""A run read query by query: where the lines of each query stand is kept in memory, not what they say."""

import gzip
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from llara.data.lines import MAX_LINE_BYTES, open_bytes, read_lines, read_whole
from llara.data.trec import parse_run_line, rank_hits, twice
from llara.errors import DataError
from llara.records import Hit


class _Span(NamedTuple):
    """Lines of one query that stand together: their first byte, the number of the first, and how many there are."""

    offset: int
    first: int
    lines: int


class Run:
    """A TREC run, checked from end to end when it is opened, then read query by query; a context manager.

    Memory grows with the queries, not with the hits. A `.gz` file is unpacked into a temporary one first, since it can
    only be read in order. DataError as `read_run` has it. An empty file is a run too: that of queries without hits.

    Attributes:
        path: The file.
        queries: Ids of the queries, in the order in which they first stand in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._spans: dict[str, list[_Span]] = {}
        self._file = self._open()
        try:
            self._scan()
        except BaseException:
            self._file.close()
            raise
        self.queries = tuple(self._spans)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[tuple[str, list[Hit]]]:
        """Yields each query's id with its hits."""
        for query_id in self.queries:
            yield query_id, self.hits(query_id)

    def __contains__(self, query_id: object) -> bool:
        return query_id in self._spans

    def hits(self, query_id: str) -> list[Hit]:
        """Returns the hits of a query in the order of `rank_hits`; none for a query that the run lacks."""
        return rank_hits(query_id, ((document_id, score) for _, document_id, score in self._read(query_id)))

    def line_of(self, query_id: str, document_id: str | None = None) -> int | None:
        """Returns the line in which a document, or the first one, stands under a query; None where it does not."""
        found = (line for line, each, _ in self._read(query_id) if document_id in (None, each))
        return next(found, None)

    def _open(self) -> BinaryIO:
        with open_bytes(self.path) as stream:  # says what is wrong with a path that cannot be read
            packed = isinstance(stream, gzip.GzipFile)
        if not packed:
            return self.path.open("rb")
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  closed by `__exit__`
        for line in read_lines(self.path) if read_whole(self.path, 1) else ():
            unpacked.write(line.data + b"\n")
        return unpacked

    def _scan(self) -> None:
        offset = number = 0
        current, seen, start = "", set[str](), _Span(0, 1, 0)
        scattered: dict[str, None] = {}
        self._file.seek(0)
        while line := self._file.readline(MAX_LINE_BYTES):
            number += 1
            query_id, document_id, _ = self._parse(number, line)
            if query_id != current:
                self._add(current, start)
                current, seen, start = query_id, set(), _Span(offset, number, 0)
                if query_id in self._spans:
                    scattered[query_id] = None
            if document_id in seen:
                raise twice(self.path, number, query_id, document_id)
            seen.add(document_id)
            start = start._replace(lines=start.lines + 1)
            offset += len(line)
        self._add(current, start)
        for query_id in scattered:
            self._refuse_twice(query_id)

    def _add(self, query_id: str, span: _Span) -> None:
        if span.lines:
            self._spans.setdefault(query_id, []).append(span)

    def _refuse_twice(self, query_id: str) -> None:
        seen: set[str] = set()
        for line, document_id, _ in self._read(query_id):
            if document_id in seen:
                raise twice(self.path, line, query_id, document_id)
            seen.add(document_id)

    def _read(self, query_id: str) -> Iterator[tuple[int, str, float]]:
        """Yields line, document id and score of each hit of a query, in the order of the file."""
        for span in self._spans.get(query_id, ()):
            self._file.seek(span.offset)
            lines = [self._file.readline(MAX_LINE_BYTES) for _ in range(span.lines)]
            for number, line in enumerate(lines, span.first):
                found, document_id, score = self._parse(number, line)
                if found != query_id:
                    raise DataError(self.path, number, "was changed while it was read; run the command again")
                yield number, document_id, score

    def _parse(self, number: int, line: bytes) -> tuple[str, str, float]:
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        oversize = b"oversize" if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n") else b""
        return parse_run_line(self.path, number, line, oversize)
