"""The raw rows of any corpus, streaming: which rows there are depends on the file's format, never on their content.

Reading (here) is kept apart from understanding (`documents.py`), so that a job may skip or report a bad row and go on,
and so that a row can be fingerprinted as it stands in the file.
"""

import heapq
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llara.data.lines import MAX_LINE_BYTES, Line, digest, plain_name, read_lines, read_whole, walk_files
from llara.data.parquet import parquet_rows
from llara.errors import DataError

Format = Literal["json lines", "tsv", "text", "parquet", "squad", "beir", "text folder", "parquet folder"]

KNOWN_FORMATS = (
    "JSON lines (.jsonl, .json), tab-separated (.tsv), plain text (.txt, .md), each also as .gz, parquet (.parquet), "
    "SQuAD JSON (.json), a folder of .txt or of .parquet files, or a BEIR folder (corpus.jsonl)"
)
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}


class Row(NamedTuple):
    """One raw row of a corpus.

    path: the file it stands in.
    line: where it starts, from 1; for SQuAD JSON the number of the paragraph, for parquet the number of the row.
    data: its bytes without line end. Where the layout rather than the row gives the id (plain text), `data` starts with
        the id and a newline, so that a checksum of `data` covers all that decides the document.
    kind: json, tsv, text, or oversize (then `data` holds the size in bytes and a checksum instead).
    """

    path: str
    line: int
    data: bytes
    kind: str


def read_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """Yields every row of the corpora, in order, good or bad, in memory bounded by the longest row (at most 64 MiB).

    SQuAD JSON is the exception: one JSON value, it is read whole. DataError for a file that is missing, empty,
    unreadable, cut (gzip), or of a format unknown, and for a folder that holds no corpus; never for a bad row.

    Plain text has no ids of its own: a passage of a file is `<stem>-<n>`, a document of a folder is its path in there.
    Of the files and folders of one call whose ids would be the same, the ids start with the name of the folder, or with
    as many folders as tell them apart: `a/notes-1`, `b/notes-1`.
    """
    paths = [Path(path) for path in paths]
    heads = _heads(paths) if len(paths) > 1 else {}
    for path in paths:
        yield from _read_one(path, heads.get(path))


def format_of(path: Path) -> Format:
    """Returns the format of a corpus file or folder, told by its name and, where that is silent, by its first line."""
    if path.is_dir():
        return _folder_format(path)
    name = plain_name(path)
    suffix = Path(name).suffix
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    first = next(read_lines(path)).data.lstrip()
    if suffix == ".json":
        return "json lines" if _is_row(first) else "squad"
    if first.startswith(b"{"):
        return "json lines"
    raise DataError(path, None, f"unknown format; known are: {KNOWN_FORMATS}")


def beir_file(folder: Path, name: str) -> Path | None:
    """Returns the file `name` of a BEIR folder, plain or as `.gz`, or None."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def squad_paragraphs(path: Path) -> list[dict[str, Any]]:
    """Returns the distinct paragraphs of SQuAD JSON as `{"_id", "title", "text", "questions": [[id, text], ...]}`.

    A paragraph that stands in the file twice is one document with the questions of both. Ids are `<article>-<n>`.
    """
    distinct: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for where, title, paragraph in _squad_entries(path):
        context = _text_field(path, paragraph, "context", where)
        if context not in distinct:
            counts[title] = counts.get(title, 0) + 1
            document_id = as_id(f"{title}-{counts[title]}")
            distinct[context] = {"_id": document_id, "title": title.replace("_", " "), "text": context, "questions": []}
        questions = paragraph.get("qas") or []
        if not isinstance(questions, list):
            raise DataError(path, None, f"{where}: the field qas is not a list")
        for number, question in enumerate(questions):
            at = f"{where}.qas[{number}]"
            pair = [_text_field(path, question, "id", at), _text_field(path, question, "question", at)]
            distinct[context]["questions"].append(pair)
    if not distinct:
        raise DataError(path, None, "the SQuAD JSON holds no paragraph")
    return list(distinct.values())


def as_id(name: str) -> str:
    """Returns a name of a file or article as an id: white space and control characters become %XX, as in an URL."""
    if name.isprintable() and " " not in name and "%" not in name:
        return name
    return "".join(
        char if char.isprintable() and not char.isspace() and char != "%" else _percent(char) for char in name
    )


def _percent(char: str) -> str:
    # surrogateescape: a file name need not be UTF-8.
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def _heads(paths: Sequence[Path]) -> dict[Path, str]:
    """Returns what ids start with, for those plain text files and folders whose ids would else be found twice."""
    alike: dict[Path, None] = {}
    named = heapq.merge(*(_names(path) for path in dict.fromkeys(paths)))
    for _, group in itertools.groupby(named, key=lambda item: item[0]):
        sharing = [path for _, path in group]
        alike.update(dict.fromkeys(sharing if len(sharing) > 1 else ()))
    for depth in range(1, max((len(path.parts) for path in alike), default=0) + 1):
        heads = {path: _head(path, depth) for path in alike}
        if len(set(heads.values())) == len(alike):
            return heads
    return {path: as_id(path.as_posix()) for path in alike}  # a/notes.txt and a/notes.md


def _names(path: Path) -> Iterator[tuple[str, Path]]:
    """Yields what the ids of a plain text file or folder would be, sorted; of a file one stands for all."""
    if path.is_dir():
        if format_of(path) == "text folder":
            yield from ((file.relative_to(path).as_posix(), path) for file in _files(path, ".txt"))
    elif _SUFFIXES.get(Path(plain_name(path)).suffix) == "text":
        yield f"{_stem(path)}-1", path


def _head(path: Path, depth: int) -> str:
    """Returns the last `depth` folders, and of a file its stem."""
    folders, last = (path.parts, []) if path.is_dir() else (path.parts[:-1], [_stem(path)])
    return "/".join([*map(as_id, folders[-depth:]), *last])


def _stem(path: Path) -> str:
    return as_id(Path(path.name.removesuffix(".gz")).stem)


def _read_one(path: Path, head: str | None) -> Iterator[Row]:
    match format_of(path):
        case "beir":
            corpus = beir_file(path, "corpus.jsonl")
            assert corpus is not None
            yield from _line_rows(corpus, "json")
        case "text folder":
            yield from _folder_rows(path, f"{head}/" if head else "")
        case "json lines":
            yield from _line_rows(path, "json")
        case "tsv":
            yield from _line_rows(path, "tsv")
        case "text":
            yield from _passage_rows(path, head or _stem(path))
        case "parquet":
            yield from _parquet_rows(path)
        case "parquet folder":
            for file in _files(path, ".parquet"):
                yield from _parquet_rows(file)
        case "squad":
            for number, paragraph in enumerate(squad_paragraphs(path), start=1):
                del paragraph["questions"]
                yield Row(str(path), number, json.dumps(paragraph).encode(), "json")


def _line_rows(path: Path, kind: str) -> Iterator[Row]:
    name = str(path)
    for line in read_lines(path, MAX_LINE_BYTES):
        if line.oversize:
            yield Row(name, line.number, line.oversize, "oversize")
        else:
            yield Row(name, line.number, line.data, kind)


def _parquet_rows(path: Path) -> Iterator[Row]:
    for number, data in enumerate(parquet_rows(path), start=1):
        if len(data) > MAX_LINE_BYTES:
            yield Row(str(path), number, b"%d %s" % (len(data), digest(data).hex().encode()), "oversize")
        else:
            yield Row(str(path), number, data, "json")


def _passage_rows(path: Path, head: str) -> Iterator[Row]:
    name, number = str(path), 0
    for number, passage in enumerate(_passages(path), start=1):
        if any(line.oversize for line in passage):
            yield Row(name, passage[0].number, _joined(passage).oversize, "oversize")
        else:
            text = b"\n".join(line.data for line in passage)
            yield Row(name, passage[0].number, f"{head}-{number}\n".encode() + text, "text")
    if number == 0:
        raise DataError(path, None, "the file holds white space only")


def _passages(path: Path) -> Iterator[list[Line]]:
    """Yields runs of lines between blank lines; one that grows too long is kept as a size and a checksum."""
    passage: list[Line] = []
    size = 0
    for line in read_lines(path, MAX_LINE_BYTES):
        if line.oversize or line.data.strip():
            passage.append(line)
            size += len(line.data) + 1
            if size > MAX_LINE_BYTES:
                passage, size = [_joined(passage)], 0
        elif passage:
            yield passage
            passage, size = [], 0
    if passage:
        yield passage


def _joined(lines: list[Line]) -> Line:
    size = sum(int(line.oversize.split()[0]) if line.oversize else len(line.data) for line in lines)
    checksum = digest(b"\n".join(line.oversize or line.data for line in lines)).hex()
    return Line(lines[0].number, b"", b"%d %s" % (size, checksum.encode()))


def _folder_rows(folder: Path, prefix: str) -> Iterator[Row]:
    for path in _files(folder, ".txt"):
        data = read_whole(path, MAX_LINE_BYTES + 1)
        if len(data) > MAX_LINE_BYTES:
            yield Row(str(path), 1, b"%d %s" % (len(data), digest(data).hex().encode()), "oversize")
        else:
            document_id = prefix + as_id(path.relative_to(folder).as_posix())
            yield Row(str(path), 1, document_id.encode() + b"\n" + data, "text")


def _files(folder: Path, suffix: str) -> Iterator[Path]:
    """Yields the files of one suffix below a folder, sorted by their relative paths, hidden ones left out."""
    for path in walk_files(folder):
        if path.suffix == suffix and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _folder_format(folder: Path) -> Format:
    if beir_file(folder, "corpus.jsonl"):
        return "beir"
    if next(_files(folder, ".txt"), None):
        return "text folder"
    if next(_files(folder, ".parquet"), None):
        return "parquet folder"
    known = "neither corpus.jsonl (or .jsonl.gz) nor a .txt or .parquet file"
    raise DataError(folder, None, f"the folder holds no corpus: {known}")


def _is_row(line: bytes) -> bool:
    """Tells JSON lines from a JSON file of one value: is the first line a whole object, and not SQuAD's?"""
    try:
        value = json.loads(line)
    except ValueError:  # also what JSON and UTF-8 errors are
        return False
    return isinstance(value, dict) and not isinstance(value.get("data"), list)


def _squad_entries(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields where a paragraph stands, its article's title, and the paragraph."""
    try:
        value = json.loads(read_whole(path))
    except (ValueError, RecursionError) as error:
        raise DataError(path, None, f"neither JSON lines nor SQuAD JSON: {error}") from error
    articles = value.get("data") if isinstance(value, dict) else None
    if not isinstance(articles, list):
        raise DataError(path, None, "neither JSON lines nor SQuAD JSON: no list in the field data")
    for number, article in enumerate(articles):
        where = f"data[{number}]"
        paragraphs = article.get("paragraphs") if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            raise DataError(path, None, f"{where}: no list in the field paragraphs")
        title = article.get("title") or f"article{number + 1}"
        for position, paragraph in enumerate(paragraphs):
            yield f"{where}.paragraphs[{position}]", str(title), paragraph


def _text_field(path: Path, value: Any, field: str, where: str) -> str:
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(path, None, f"{where}: the field {field} is missing or not text")
    return text
