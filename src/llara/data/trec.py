"""Judgements and runs as files. Ids hold no white space (`documents.check_id`), so columns are cut at it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llara.data.lines import read_lines, read_whole
from llara.data.numbers import fits_float32, is_whole, to_float
from llara.errors import DataError
from llara.files import write_atomic
from llara.records import Hit, Qrel

# What the third column of a header line is called: a first line with anything else there is a judgement, or a bad one.
_HEADERS = {"score", "relevance", "rel", "label", "grade", "rating"}


class QrelLine(NamedTuple):
    """A judgement and the line it stands in."""

    line: int
    qrel: Qrel


def read_qrel_lines(path: Path) -> list[QrelLine]:
    """Returns the judgements of a file with their lines.

    Formats: TREC and MS MARCO (query, iteration, document, relevance), or BEIR (query, document, score; its header line
    is passed over). DataError with the line for other columns, a relevance that is no whole number, or a repeated pair.
    """
    found: list[QrelLine] = []
    seen: dict[tuple[str, str], int] = {}
    for number, columns in _columns(path):
        if number == 1 and len(columns) == 3 and columns[2].lower() in _HEADERS:
            continue
        if len(columns) not in (3, 4):
            wanted = "4 (query 0 document relevance) or 3 (query-id corpus-id score)"
            raise DataError(path, number, f"{len(columns)} columns; a judgement has {wanted}")
        query_id, document_id, relevance = columns[0], columns[-2], columns[-1]
        if not is_whole(relevance):
            raise DataError(path, number, f"the relevance {relevance!r} is not a whole number")
        first = seen.setdefault((query_id, document_id), number)
        if first != number:
            raise DataError(
                path, number, f"query {query_id!r} and document {document_id!r} are judged twice: line {first}"
            )
        found.append(QrelLine(number, Qrel(query_id, document_id, int(relevance))))
    if not found:
        raise DataError(path, None, "the file holds no judgement")
    return found


def read_run(path: Path) -> dict[str, list[Hit]]:
    """Returns the hits of a TREC run per query, in the order of `rank_hits`; the ranks of the file are not believed.

    An empty file is a run too: that of queries without hits. DataError with the line for other than 6 columns, a score
    that is not a finite number, or a repeated document.
    """
    path = Path(path)
    if path.is_file() and not read_whole(path, 1):  # a pipe can be read only once, and is read below
        return {}
    scores: dict[str, dict[str, float]] = {}
    for line in read_lines(path):
        query_id, document_id, score = parse_run_line(path, line.number, line.data, line.oversize)
        hits = scores.setdefault(query_id, {})
        if document_id in hits:
            raise twice(path, line.number, query_id, document_id)
        hits[document_id] = score
    return {query_id: rank_hits(query_id, hits.items()) for query_id, hits in scores.items()}


def parse_run_line(path: Path, number: int, data: bytes, oversize: bytes = b"") -> tuple[str, str, float]:
    """Returns query id, document id and score of one line of a run; DataError where it is none."""
    columns = _split(path, number, data, oversize)
    if len(columns) != 6:
        raise DataError(path, number, f"{len(columns)} columns; a run has 6 (query Q0 document rank score tag)")
    query_id, _, document_id, rank, score, _ = columns
    if not is_whole(rank):
        raise DataError(path, number, f"the rank {rank!r} is not a whole number (column 4; the score is column 5)")
    value = to_float(score)
    if not fits_float32(value):
        raise DataError(path, number, f"the score {score!r} is not a finite float32 number")
    return query_id, document_id, value


def twice(path: Path, number: int, query_id: str, document_id: str) -> DataError:
    """Returns the error for a document that stands a second time under a query."""
    return DataError(path, number, f"document {document_id!r} stands twice under query {query_id!r}")


def rank_hits(query_id: str, scored: Iterable[tuple[str, float]]) -> list[Hit]:
    """Returns (document id, score) as ranked hits; scores are rounded to float32.

    Order: score descending, then document id DESCENDING. trec_eval breaks ties so and ignores the ranks in the file;
    ordering by the same rule makes our ranks and its ranks agree. (Python compares strings by code point, trec_eval by
    UTF-8 byte: the same order.)
    """
    rounded = [(float(np.float32(score)), document_id) for document_id, score in scored]
    rounded.sort(reverse=True)
    return [Hit(query_id, document_id, rank, score) for rank, (score, document_id) in enumerate(rounded, start=1)]


def write_run(
    path: Path, hits: Mapping[str, Sequence[Hit]] | Iterable[tuple[str, Sequence[Hit]]], tag: str = "llara"
) -> None:
    """Writes a TREC run, whole or not at all: queries in the order given, their hits in the order of `rank_hits`.

    Pairs of query id and hits are taken one by one, so that a long run need not be in memory. A score is the shortest
    decimal that reads back as the same float32. ValueError for a score that is not finite.
    """
    write_atomic(Path(path), _run_lines(hits.items() if isinstance(hits, Mapping) else hits, tag))


def _run_lines(hits: Iterable[tuple[str, Sequence[Hit]]], tag: str) -> Iterator[bytes]:
    for query_id, of_query in hits:
        yield run_lines(query_id, of_query, tag)


def run_lines(query_id: str, hits: Sequence[Hit], tag: str = "llara") -> bytes:
    """Returns one query's part of a run; see `write_run`."""
    lines = []
    for hit in rank_hits(query_id, ((hit.document_id, hit.score) for hit in hits)):
        if not math.isfinite(hit.score):
            raise ValueError(f"the score of document {hit.document_id!r} for query {query_id!r} is {hit.score}")
        lines.append(f"{query_id} Q0 {hit.document_id} {hit.rank} {np.float32(hit.score)!s} {tag}\n")
    return "".join(lines).encode()


def _columns(path: Path) -> Iterator[tuple[int, list[str]]]:
    for line in read_lines(path):
        yield line.number, _split(path, line.number, line.data, line.oversize)


def _split(path: Path, number: int, data: bytes, oversize: bytes) -> list[str]:
    try:
        columns = data.decode().split()
    except UnicodeDecodeError as error:
        raise DataError(path, number, f"not UTF-8 at offset {error.start}") from error
    if oversize or not columns:
        raise DataError(path, number, "line too long" if oversize else "blank line")
    return columns
