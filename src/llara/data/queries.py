"""Queries from a plain file; for those of a collection see `collections.py`."""

from collections.abc import Iterator
from pathlib import Path

from llara.data.documents import check_id, check_text, decode, parse_object, take_id
from llara.data.rows import Row, read_rows
from llara.errors import DataError
from llara.records import Query


def read_query_file(path: Path) -> list[Query]:
    """Returns the queries of JSON lines (`_id` or `id`; `text` or `query`) or of a tsv with two columns (id, text).

    DataError with file and line for a row that is neither, and for a repeated id.
    """
    queries: list[Query] = []
    seen: dict[str, int] = {}
    for row, query in iter_queries(path):
        first = seen.setdefault(query.id, row.line)
        if first != row.line:
            raise DataError(row.path, row.line, f"duplicate query id {query.id!r}, first in line {first}")
        queries.append(query)
    return queries


def iter_queries(path: Path) -> Iterator[tuple[Row, Query]]:
    """Yields the rows of a plain file with their queries, in bounded memory; repeated ids are left to the caller."""
    for row in read_rows([path]):
        if row.kind == "tsv":
            yield row, _from_columns(row)
        elif row.kind == "text":
            raise DataError(path, None, "queries are JSON lines (_id, text), a .tsv (id, text), or a collection")
        else:
            yield row, _from_object(row)


def _from_object(row: Row) -> Query:
    fields = parse_object(row)
    query_id = take_id(row, fields, "query")
    field = "query" if "text" not in fields and "query" in fields else "text"
    return Query(query_id, check_text(row, fields.get(field), "query", field))


def _from_columns(row: Row) -> Query:
    line = decode(row, row.data)
    if not line.strip():
        raise DataError(row.path, row.line, "blank line")
    columns = line.split("\t")
    if len(columns) != 2:
        raise DataError(row.path, row.line, f"{len(columns)} tab-separated columns; a query has 2 (id, text)")
    return Query(check_id(row, columns[0], "query"), check_text(row, columns[1], "query"))
