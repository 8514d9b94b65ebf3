"""Rows of parquet files as the JSON objects that they stand for, streaming; needs pyarrow, the extra `data`."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llara.data.lines import open_bytes
from llara.errors import DataError, MissingExtra

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"PAR1"
ROWS_AT_ONCE = 128  # texts may be long; more rows at once are hardly faster
_TEXT_FIELDS = ("_id", "id", "title", "text", "question", "answer")


def parquet_rows(path: Path) -> Iterator[bytes]:
    """Yields each row as a JSON object in bytes, like a line of JSON lines, in the order of the file.

    Numbers, text, dates and lists become what JSON has for them, numbers that JSON lacks (NaN) become null. Binary
    columns are left out, but for those that are read as text, which old writers leave unmarked. Text that is not UTF-8
    stays as it is, for the reader of the row to name.

    Raises:
        DataError: The file is missing, unreadable, empty or damaged.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra(f"{path}: reading parquet", "data") from error
    with open_bytes(path):  # says what is wrong with a path that is no file
        pass
    number = 0
    try:
        # Neither threads nor reading ahead: both would hold whole row groups.
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
            names = [field.name for field in file.schema_arrow if _is_wanted(field)]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=names, use_threads=False):
                for row in _objects(batch):
                    number += 1
                    yield row
    except (pa.ArrowException, OSError, ValueError) as error:
        after = f" after row {number:,}" if number else ""
        reason = str(error).strip().partition("\n")[0]
        raise DataError(path, None, f"is no parquet file, or is damaged{after} ({reason})") from error
    if not number:
        raise DataError(path, None, "the parquet file holds no row")


def _is_wanted(field: "pa.Field") -> bool:
    import pyarrow as pa

    def binary(kind: "pa.DataType") -> bool:
        if any(binary(kind.field(i).type) for i in range(kind.num_fields)):
            return True
        return bool(
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_binary_view(kind)
            or pa.types.is_fixed_size_binary(kind)
        )

    return field.name in _TEXT_FIELDS or not binary(field.type)


def _objects(batch: "pa.RecordBatch") -> Iterator[bytes]:
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        fields = dict(zip(batch.schema.names, values, strict=True))
        try:
            text = json.dumps(fields, ensure_ascii=False, allow_nan=False, default=str)
        except ValueError:
            text = json.dumps(_finite(fields), ensure_ascii=False, default=str)
        yield text.encode("utf-8", "surrogateescape")


def _values(column: "pa.Array") -> list[Any]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary())  # arrow does not check that text is UTF-8, and fails where it is not
    elif pa.types.is_temporal(kind):
        column = column.cast(pa.string())  # Python has no nanoseconds
    values: list[Any] = column.to_pylist()
    return [value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value for value in values]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
