"""What a corpus holds, without reading all of it: rows and bytes, counted or estimated, and a sample spread over it.

A small corpus is read once: its rows are counted, and each has the same chance to be in the sample. Of a large plain
file rows are read at places drawn from the seed, one in each of many equal parts of it. A packed file cannot be entered
in the middle, so of a large one the beginning has to stand for the rest, and the survey says so.
"""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from llara.data.documents import parse_document
from llara.data.lines import MAX_LINE_BYTES, open_bytes, read_whole, walk_files
from llara.data.rows import Row, beir_file, format_of, read_rows
from llara.encoding.shards import write_documents
from llara.errors import DataError
from llara.plan.measure import folder_bytes
from llara.progress import hushed
from llara.records import Document

COUNT_BYTES = 256 * 2**20  # unpacked; a corpus up to this size is read whole, which takes seconds
HEAD_BYTES = 32 * 2**20  # of what can only be read from its beginning
ROWS_PER_PLACE = 4
PILOTS = 64  # places where one row is read first, to see how long rows are
SEED = 42  # of the sample, where the job has no seed of its own
UNPACKED = {"gzip": 4, "parquet": 3}  # times larger than packed: a first guess, only to choose how to read


Item = TypeVar("Item")


class Sampled(NamedTuple):
    """One row of the sample; `near` is the byte of its file that it stands near, where its line is not known."""

    row: Row
    bytes: int
    near: int | None = None


@dataclass(frozen=True)
class Survey:
    """What a corpus holds: rows, their bytes unpacked, a sample of them, and how long reading all rows takes.

    `counted` tells whether rows and bytes are exact. `remarks` say in words what is not.
    """

    rows: int
    bytes: int
    counted: bool
    sample: tuple[Sampled, ...]
    read_seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What a sum over the sample is multiplied by to stand for the corpus: bytes, not rows, for lengths vary."""
        return self.bytes / max(sum(each.bytes for each in self.sample), 1)

    def counting(self, what: str) -> str:
        """Says how documents were counted, and what else was with them."""
        if self.counted and len(self.sample) == self.rows:
            return f"documents and {what} were counted, for the corpus is no larger than the sample"
        how = "counted" if self.counted else "estimated"
        return f"documents were {how}; {what} are those of {len(self.sample):,} of them, in proportion to their bytes"


def survey(paths: Sequence[Path], count: int, seed: int) -> Survey:
    """Looks at corpora and returns what they hold, with a sample of about `count` rows, the same for a seed.

    Raises:
        DataError: A path is missing, empty, unreadable, or of a format unknown.
    """
    guesses = [_guess(path) for path in paths]
    if sum(guesses) <= COUNT_BYTES:
        return _count(read_rows(paths), count, seed)
    parts = []
    for number, (path, guess) in enumerate(zip(paths, guesses, strict=True)):
        share = max(round(count * guess / sum(guesses)), 1)
        if guess <= COUNT_BYTES // len(paths):
            parts.append(_count(read_rows([path]), share, seed + number))
        else:
            parts.append(_estimate(path, share, seed + number))
    return Survey(
        rows=sum(part.rows for part in parts),
        bytes=sum(part.bytes for part in parts),
        counted=all(part.counted for part in parts),
        sample=tuple(each for part in parts for each in part.sample),
        read_seconds=sum(part.read_seconds for part in parts),
        remarks=tuple(dict.fromkeys(remark for part in parts for remark in part.remarks)),
    )


def documents(sample: Iterable[Sampled], *, needs_id: bool = True) -> list[Document]:
    """Returns the documents of a sample; see `parse_document`.

    Raises:
        DataError: A row is bad: the job would stop at it, too.
    """
    found = []
    for each in sample:
        try:
            found.append(parse_document(each.row, needs_id=needs_id))
        except DataError as error:
            if each.near is None:
                raise
            raise DataError(each.row.path, None, f"near byte {each.near:,}: {error.reason}") from error
    return found


def good_documents(sample: Sequence[Sampled]) -> list[Document]:
    """Returns the documents of a sample, bad rows left out, as `encode` and `index` leave them out.

    Raises:
        DataError: Every row is a bad one; says what is wrong with the first.
    """
    found: list[Document] = []
    first: DataError | None = None
    for each in sample:
        try:
            found += documents([each])
        except DataError as error:
            first = first or error
    if not found and first is not None:
        raise DataError(first.path, first.line, f"{first.reason}; nor is any other row of the sample a document")
    return found


class Stored(NamedTuple):
    """What a document store takes: bytes and seconds per row, and seconds per shard, however few rows it has."""

    bytes_per_row: float
    seconds_per_row: float
    seconds_per_shard: float

    def seconds(self, rows: int, shards: int) -> float:
        """Returns what storing so many rows takes."""
        return self.seconds_per_row * rows + self.seconds_per_shard * shards


def store(folder: Path, sample: Sequence[Sampled]) -> Stored:
    """Stores one row of a sample, then all, in folders of their own below `folder`."""
    seconds = []
    for number, rows in enumerate((sample[:1], sample)):
        began = time.perf_counter()
        with hushed():
            write_documents(folder / str(number), (each.row for each in rows))
        seconds.append(time.perf_counter() - began)
    once, whole = seconds
    return Stored(folder_bytes(folder / "1") / len(sample), max(whole - once, 0.0) / len(sample), once)


def _guess(path: Path) -> int:
    """Returns about how many bytes a corpus has unpacked, only to choose how to read it."""
    if not path.exists():
        raise DataError(path, None, "no such file or folder")
    kind = format_of(path)
    if kind == "beir":
        path = _corpus_file(path)
    if path.is_dir():
        size = sum(file.stat().st_size for file in _files(path, kind))
        return size * UNPACKED["parquet"] if kind == "parquet folder" else size
    size = path.stat().st_size
    if kind == "parquet":
        return size * UNPACKED["parquet"]
    return size * UNPACKED["gzip"] if _is_packed(path) else size


def _estimate(path: Path, count: int, seed: int) -> Survey:
    kind = format_of(path)
    if kind == "beir":
        path, kind = _corpus_file(path), "json lines"
    if kind == "text folder":
        return _folder(path, count, seed)
    if kind in ("parquet", "parquet folder"):
        return _parquet(path, list(_files(path, kind)) if path.is_dir() else [path], count, seed)
    if kind == "squad":  # one JSON value: there is no other way than to read it
        return _count(read_rows([path]), count, seed)
    if _is_packed(path):
        return _packed(path, kind, count, seed)
    return _places(path, kind, count, seed)


def _count(rows: Iterable[Row], count: int, seed: int) -> Survey:
    """Reads all rows; each has the same chance to be in the sample."""
    began, number, total = time.perf_counter(), 0, 0

    def measured() -> Iterator[Sampled]:
        nonlocal number, total
        for row in rows:
            size = row_bytes(row)
            number, total = number + 1, total + size
            yield Sampled(row, size)

    sample = draw_sample(measured(), count, seed)
    return Survey(number, total, True, tuple(sample), time.perf_counter() - began)


def draw_sample(items: Iterable[Item], count: int, seed: int) -> list[Item]:
    """Returns `count` of the items, or all where there are fewer, in their order; each has the same chance to be there.

    Vitter, Random Sampling with a Reservoir (ACM TOMS 1985), algorithm R.
    """
    draw, kept = random.Random(seed), list[tuple[int, Item]]()
    for number, item in enumerate(items):
        if number < count:
            kept.append((number, item))
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = (number, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def row_bytes(row: Row) -> int:
    """Returns about how many bytes a row takes in its file."""
    if row.kind == "oversize":
        return int(row.data.split()[0])
    return len(row.data) - (row.data.find(b"\n") if row.kind == "text" else -1)


def _places(path: Path, kind: str, count: int, seed: int) -> Survey:
    """Reads the rows that begin in short windows of a plain file: one window, drawn from the seed, in each equal part.

    So each row has the same chance to be in the sample, however long it is and whatever stands around it.
    """
    size, draw = path.stat().st_size, random.Random(seed)
    places = max(count // ROWS_PER_PLACE, 1)
    with open_bytes(path) as stream:
        starts = [int((number + draw.random()) * size / places) for number in range(places)]
        some = [next(_rows_from(stream, path, kind, start), None) for start in starts[:: max(places // PILOTS, 1)]]
        lengths = [each.bytes for each in some if each is not None]
        window = ROWS_PER_PLACE * sum(lengths) / max(len(lengths), 1)
        sample: dict[int, Sampled] = {}  # by where they begin: windows may overlap
        for start in starts:
            for each in _rows_from(stream, path, kind, start):
                if each.near is None or each.near >= start + window:
                    break
                sample[each.near] = each
    if not sample:
        raise DataError(path, None, f"has no row at any of {places:,} places where it was read")
    rows_in_all = round(size * len(sample) / sum(each.bytes for each in sample.values()))
    remark = f"{path.name}: rows estimated from {len(sample):,} of them, read at {places:,} places all over the file"
    return Survey(rows_in_all, size, False, tuple(sample.values()), _seconds_per_byte(path) * size, (remark,))


def _seconds_per_byte(path: Path) -> float:
    """Returns what reading rows one after the other takes, measured at the beginning of a file."""
    began, read = time.perf_counter(), 0
    for row in read_rows([path]):
        read += row_bytes(row)
        if read >= HEAD_BYTES // 4:
            break
    return (time.perf_counter() - began) / max(read, 1)


def _rows_from(stream: Any, path: Path, kind: str, start: int) -> Iterator[Sampled]:
    """Yields the rows from a place in a file on, beginning with the first that begins there; up to its end."""
    stream.seek(max(start - 1, 0))
    if start:
        _skip(stream, kind)
    while True:
        begin = stream.tell()
        data = _next_row(stream, kind)
        if data is None:
            return
        size = stream.tell() - begin
        if len(data) > MAX_LINE_BYTES:
            yield Sampled(Row(str(path), 0, b"%d -" % size, "oversize"), size, begin)
        elif kind == "text":
            head = f"{path.stem}-at-{begin}\n".encode("utf-8", "replace")
            yield Sampled(Row(str(path), 0, head + data, "text"), size, begin)
        else:
            yield Sampled(Row(str(path), 0, data, "tsv" if kind == "tsv" else "json"), size, begin)


def _skip(stream: BinaryIO, kind: str) -> None:
    """Reads to the end of the row that the place lies in: it may have begun before."""
    line = stream.readline(MAX_LINE_BYTES)
    while (line and not line.endswith(b"\n")) or (kind == "text" and line.strip()):
        line = stream.readline(MAX_LINE_BYTES)


def _next_row(stream: BinaryIO, kind: str) -> bytes | None:
    line = stream.readline(MAX_LINE_BYTES + 2)
    if kind != "text":
        return line.removesuffix(b"\n").removesuffix(b"\r") if line else None
    lines: list[bytes] = []
    while line and (line.strip() or not lines):
        lines += [line.rstrip(b"\r\n")] if line.strip() else []
        line = stream.readline(MAX_LINE_BYTES + 2)
    return b"\n".join(lines) if lines else None


def _packed(path: Path, kind: str, count: int, seed: int) -> Survey:
    """Reads the beginning of a gzip file, and takes the rest to be like it."""
    began, head, read = time.perf_counter(), list[Sampled](), 0
    with open_bytes(path) as stream:
        for each in _rows_from(stream, path, kind, 0):
            head.append(each._replace(near=None))
            read += each.bytes
            if read >= HEAD_BYTES:
                break
        packed = stream.fileobj.tell()  # type: ignore[union-attr]
    took = time.perf_counter() - began
    size = path.stat().st_size
    scale = max(size / max(packed, 1), 1.0)
    sample = tuple(random.Random(seed).sample(head, min(count, len(head))))
    what = f"only its beginning was read ({read / 2**20:,.0f} MiB unpacked)"
    remark = f"{path.name}: packed, so {what}; the rest may differ"
    return Survey(round(len(head) * scale), round(read * scale), False, sample, took * scale, (remark,))


def _folder(path: Path, count: int, seed: int) -> Survey:
    """Counts the files of a folder of texts, one a document, and reads a sample of them."""
    number, total = 0, 0

    def measured() -> Iterator[Path]:
        nonlocal number, total
        for file in _files(path, "text folder"):
            number, total = number + 1, total + file.stat().st_size
            yield file

    picked = draw_sample(measured(), count, seed)
    began, sample = time.perf_counter(), list[Sampled]()
    for file in picked:
        data = read_whole(file, MAX_LINE_BYTES)
        name = file.relative_to(path).as_posix().encode("utf-8", "replace").replace(b" ", b"%20")
        sample.append(Sampled(Row(str(file), 1, name + b"\n" + data, "text"), len(data)))
    took = (time.perf_counter() - began) * number / max(len(sample), 1)
    return Survey(number, total, True, tuple(sample), took)


def _parquet(path: Path, files: Sequence[Path], count: int, seed: int) -> Survey:
    """Reads the first rows of parquet files; how many there are stands in the files."""
    began, share = time.perf_counter(), max(count // len(files), 1)
    picked = files if len(files) <= count else random.Random(seed).sample(list(files), count)
    sample = [Sampled(row, row_bytes(row)) for file in picked for row in islice(read_rows([file]), share)]
    took = time.perf_counter() - began
    from pyarrow import parquet  # it is there, or reading has said how to install it

    rows = sum(parquet.read_metadata(file).num_rows for file in files)
    scale = rows / max(len(sample), 1)
    size = round(sum(each.bytes for each in sample) * scale)
    remark = f"{path.name}: the first {share:,} rows of {len(picked):,} parquet file(s) stand for all"
    return Survey(rows, size, False, tuple(sample), took * scale, (remark,))


def _corpus_file(folder: Path) -> Path:
    found = beir_file(folder, "corpus.jsonl")
    assert found is not None
    return found


def _files(folder: Path, kind: str) -> Iterator[Path]:
    suffix = ".parquet" if kind == "parquet folder" else ".txt"
    for path in walk_files(folder):
        if path.suffix == suffix and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
