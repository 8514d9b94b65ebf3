"""The documentation strings of the installed Python packages, as a collection that is real text on every machine.

Query = the first sentence of a documentation string; document = the rest of it. Sources are read with `ast`, never
imported. What is found depends on the installed versions; in one environment it is the same each time.
"""

import ast
import contextlib
import gc
import importlib.metadata
import inspect
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llara.data.collections import check_split
from llara.data.splits import drop_shared, split_by_module
from llara.records import Document, Qrel, Query

MIN_SUMMARY_WORDS = 4
MIN_BODY_WORDS = 15
MAX_SUMMARY_WORDS = 60
"""A longer first sentence is none: a list or a formula without full stops."""

_SKIPPED_PARTS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__", "_vendor"}
)
_SKIPPED_FILE = re.compile(r"test_.*|.*_test|conftest")
_NAMED_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")
# Where a first paragraph stops being prose although no blank line follows: fields, lists, doctests, section heads.
_NOT_PROSE = re.compile(
    r"[:@]\w+|>>>|[-*+] |\.\. |\d+[.)] |=+$|-+$|(Args|Arguments|Parameters|Returns|Examples?|Note):?$"
)
_ARGUMENT = re.compile(r"[\w`*]+ ?(\(.*?\))?:\s|[\w`*, ]+ : ")  # a list of arguments that no sentence introduces
_SIGNATURE = re.compile(r"\A[\w.]+\([^\n]*\)(?: *->[^\n]*)?\n+")  # as C extensions and torch put it first
_SENTENCE_END = re.compile(r"[.!?][)\"'`]*(?=\s+(?P<next>\S)|$)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'])(?:e\.g|i\.e|etc|cf|vs|resp|approx|fig|eq|no|dr|mr|st|al|viz|incl|[A-Z])\.$", re.I
)


class DocstringRow(NamedTuple):
    """One documentation string. `id` is `module:qualified.name`; `package` is the first part of the module's name."""

    id: str
    module: str
    package: str
    summary: str
    body: str


class Scan(NamedTuple):
    """What was found: rows sorted by id, how many files were read, and which could not be parsed."""

    rows: list[DocstringRow]
    files: int
    unreadable: list[Path]


def read_docstrings(
    packages: Sequence[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> list[DocstringRow]:
    """Returns the documentation strings that share neither summary nor body with another, sorted by id.

    packages: names of the packages to read; default: the standard library and all that llara depends on.
    progress: called with (files read, files in all) after each file.
    """
    rows = scan_docstrings(packages, progress).rows
    return drop_shared(rows, [lambda row: row.summary, lambda row: row.body])


def scan_docstrings(packages: Sequence[str] | None = None, progress: Callable[[int, int], None] | None = None) -> Scan:
    """Returns every documentation string that qualifies, repeats included; see `read_docstrings`."""
    files = [(module, path) for module, path in _source_files() if packages is None or _package(module) in packages]
    found: dict[str, DocstringRow] = {}
    unreadable: list[Path] = []
    with _no_garbage_collection():
        for done, (module, path) in enumerate(files, start=1):
            tree = _parse(path)
            if tree is None:
                unreadable.append(path)
            else:
                rows = (_row(module, name, docstring) for name, docstring in _documented(tree, ""))
                for row in filter(None, rows):
                    found.setdefault(row.id, row)  # a name defined twice, e.g. for two platforms, counts once
            if progress is not None:
                progress(done, len(files))
    return Scan(sorted(found.values()), len(files), unreadable)


class DocstringCollection:
    """Documentation strings as a collection (see `collections.Collection`), split by module."""

    path = Path("installed packages")
    splits = ("train", "dev", "test")

    def __init__(self, rows: Sequence[DocstringRow]) -> None:
        self._rows = list(rows)

    def documents(self) -> Iterator[Document]:
        """Yields the bodies; module and package are in the metadata, the object's name is in the id alone."""
        for row in self._rows:
            yield Document(row.id, row.body, "", {"module": row.module, "package": row.package})

    def queries(self, split: str | None = None) -> list[Query]:
        """Returns the summaries of the split, or all; a query has the id of its document."""
        if split is not None:
            check_split(self, split)
        return [Query(row.id, row.summary) for row in self._rows if split in (None, split_by_module(row.module))]

    def qrels(self, split: str) -> list[Qrel]:
        """Returns one judgement per query of the split."""
        return [Qrel(query.id, query.id, 1) for query in self.queries(check_split(self, split))]


def docstring_collection(rows: Sequence[DocstringRow]) -> DocstringCollection:
    """Returns the rows as a collection with one relevant document per query."""
    return DocstringCollection(rows)


def split_docstring(docstring: str) -> tuple[str, str]:
    """Returns the first sentence of a documentation string, on one line, and the rest, dedented; either may be empty.

    The first sentence ends at the first full stop, question or exclamation mark that is not part of an abbreviation, a
    number, a name, brackets or code, and at the latest where the first paragraph does. A signature before it is left
    out: it is the object's name over again.
    """
    lines = textwrap.dedent(_SIGNATURE.sub("", inspect.cleandoc(docstring))).split("\n")
    length = next((n for n, line in enumerate(lines) if n and _ends_prose(line)), len(lines))
    paragraph = "\n".join(lines[:length])
    end = _sentence_end(paragraph)
    rest = "\n".join([paragraph[end:].lstrip(" "), *lines[length:]])
    return " ".join(paragraph[:end].split()), textwrap.dedent(rest).strip()


def _ends_prose(line: str) -> bool:
    return not line.strip() or _NOT_PROSE.match(line.strip()) is not None


def _sentence_end(paragraph: str) -> int:
    for match in _SENTENCE_END.finditer(paragraph):
        before = paragraph[: match.end()]
        following = match.group("next") or ""
        closed = before.count("`") % 2 == 0 and before.count("(") <= before.count(")")
        if closed and not following.islower() and not _ABBREVIATION.search(before.rstrip(")\"'`")):
            return match.end()
    return len(paragraph)


def _row(module: str, name: str, docstring: str) -> DocstringRow | None:
    # The cheap test first: most documentation strings are too short.
    if len(docstring.split()) < MIN_SUMMARY_WORDS + MIN_BODY_WORDS or "\x00" in docstring:
        return None
    summary, body = split_docstring(docstring)
    words = len(summary.split())
    if not MIN_SUMMARY_WORDS <= words <= MAX_SUMMARY_WORDS or len(body.split()) < MIN_BODY_WORDS:
        return None
    if _NOT_PROSE.match(summary) or _ARGUMENT.match(summary):
        return None
    return DocstringRow(f"{module}:{name}", module, _package(module), summary, body)


def _documented(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields the qualified name and documentation string of classes, methods and functions, not of nested functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child, clean=False)
            if docstring:
                yield prefix + child.name, docstring
            if isinstance(child, ast.ClassDef):
                yield from _documented(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _documented(child, prefix)


def _parse(path: Path) -> ast.Module | None:
    """Returns the syntax tree of a source file, or None where Python cannot read it (templates, other versions)."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return ast.Module([], [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's code
            return ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees hold no cycles: searching millions of nodes for some takes a third of the time and frees nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _source_files() -> list[tuple[str, Path]]:
    """Returns (module name, file) of the standard library and of what llara depends on, sorted, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {_module(path.relative_to(root)): path for path in _walk(root)}
    for distribution in _distributions():
        for file in distribution.files or []:
            relative = Path(str(file))
            if relative.suffix == ".py" and ".." not in relative.parts and not _is_skipped(relative):
                found.setdefault(_module(relative), Path(str(distribution.locate_file(file))))
    return sorted(found.items())


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in _SKIPPED_PARTS or path.name.startswith("."):
            continue
        if path.is_dir():
            # Folders that cannot be part of a module's name hold no modules (config-3.11-..., lib-dynload).
            if path.name.isidentifier():
                yield from _walk(path)
        elif path.suffix == ".py" and not _is_skipped(Path(path.name)):
            yield path


def _is_skipped(relative: Path) -> bool:
    if any(part in _SKIPPED_PARTS or not part.isidentifier() for part in relative.parts[:-1]):
        return True
    return not relative.stem.isidentifier() or _SKIPPED_FILE.fullmatch(relative.stem) is not None


def _module(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _distributions() -> list[importlib.metadata.Distribution]:
    """Returns what llara depends on, directly or not, without llara itself; all that is installed if llara is not.

    Development tools in the same environment do not count, so that the collection is the same with and without them.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = ["llara"]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        for requirement in found[name].requires or []:
            match = _NAMED_REQUIREMENT.match(requirement)
            if match and "extra ==" not in requirement:
                waiting.append(match.group())
    own = found.pop("llara", None)
    if own is None:
        found = {str(item.metadata["Name"]).lower(): item for item in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found)]
