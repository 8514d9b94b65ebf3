"""Which input rows become documents: those that parse, and of rows with one id the first."""

import hashlib
from collections.abc import Sequence
from typing import Any

from llara.data import Row, parse_document
from llara.data.seen import FirstSeen, place_of
from llara.encoding.documents import MAX_ROW_BYTES
from llara.errors import DataError
from llara.records import Document


def sift_rows(batch: Sequence[Row], start: int, seen: FirstSeen) -> tuple[list[Document], list[dict[str, Any]]]:
    """Parts rows into documents and rejected rows; of rows with the same id the first in the corpus stays."""
    parsed: list[tuple[int, Row, Document]] = []
    rejected: list[dict[str, Any]] = []
    for number, row in enumerate(batch, start + 1):
        try:
            # A paragraph of SQuAD JSON is no line, so its length was not limited when it was read.
            if len(row.data) > MAX_ROW_BYTES:
                raise DataError(row.path, row.line, f"has {len(row.data):,} bytes; at most {MAX_ROW_BYTES:,} are kept")
            parsed.append((number, row, parse_document(row)))
        except DataError as error:
            rejected.append({"row": number, "file": row.path, "line": row.line, "reason": error.reason})
    firsts = seen.add_all([(document.id, place_of(row)) for _, row, document in parsed])
    documents: list[Document] = []
    for (number, row, document), first in zip(parsed, firsts, strict=True):
        if first is None:
            documents.append(document)
        else:
            where = {"row": number, "file": row.path, "line": row.line, "id": document.id}
            rejected.append({**where, "reason": f"duplicate id (first at {first})"})
    return documents, sorted(rejected, key=lambda entry: int(entry["row"]))


def digest_rows(batch: Sequence[Row]) -> str:
    """Returns the SHA-256 of raw rows: where they stand does not count, so a corpus may move."""
    digest = hashlib.sha256()
    for row in batch:
        digest.update(f"{row.kind} {len(row.data)}\n".encode())
        digest.update(row.data)
    return digest.hexdigest()
