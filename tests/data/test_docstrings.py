"""Documentation strings: what counts as the first sentence, what is left out, and that a scan repeats itself."""

from pathlib import Path

import pytest

from llara.data import docstrings
from llara.data.docstrings import (
    DocstringCollection,
    docstring_collection,
    read_docstrings,
    scan_docstrings,
    split_docstring,
)
from llara.data.splits import normalise, split_by_module
from llara.errors import DataError
from llara.records import Qrel


@pytest.mark.parametrize(
    ("docstring", "summary", "body"),
    [
        ("Read a file. Then close it.", "Read a file.", "Then close it."),
        ("Read a file\n\n    The rest\n      is here.\n    ", "Read a file", "The rest\n  is here."),
        ("Read\n    a long\n    file! More.", "Read a long file!", "More."),
        ("Use one, e.g. This one. More.", "Use one, e.g. This one.", "More."),
        ("Use it (i.e. A thing). More.", "Use it (i.e. A thing).", "More."),
        ("Read version 3.11 of os.path here. More.", "Read version 3.11 of os.path here.", "More."),
        ("Call `a. B` first. More.", "Call `a. B` first.", "More."),
        ("Read it (or not. Really). More.", "Read it (or not. Really).", "More."),
        ("Is it open? More.", "Is it open?", "More."),
        ("Stops etc. and goes on. More.", "Stops etc. and goes on.", "More."),
        ("By J. Smith and others. More.", "By J. Smith and others.", "More."),
        ("Read it\n    :param x: the thing.", "Read it", ":param x: the thing."),
        ("Read it\n    Args:\n        x: thing", "Read it", "Args:\n    x: thing"),
        ("Read it:\n    - one\n    - two", "Read it:", "- one\n- two"),
        ("read(path, mode='r') -> File\n\n    Read it. More.", "Read it.", "More."),
        ("Only this", "Only this", ""),
        ("", "", ""),
    ],
)
def test_the_first_sentence(docstring: str, summary: str, body: str) -> None:
    assert split_docstring(docstring) == (summary, body)


LONG = "This body has more than fifteen words so that it is long enough to be a document here."
SOURCE = f'''
def plain():
    """Return the plain thing. {LONG}"""
    def inner():
        """Return the inner thing. {LONG}"""

async def later():
    """Return the later thing. {LONG}"""

class Thing:
    """Hold the main thing. {LONG}"""

    def method(self):
        """Return the method thing. {LONG}"""

if True:
    try:
        def guarded():
            """Return the guarded thing. {LONG}"""
    except ImportError:
        def guarded():
            """Return the other guarded thing. {LONG}"""

def short():
    """Return it. {LONG}"""

def bare():
    """Return the bare old thing. Too short a body."""

def listed():
    """size (int, optional): the size of the thing. {LONG}"""

def undocumented():
    pass
'''


def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str | bytes]) -> None:
    found = []
    for module, source in files.items():
        path = tmp_path / f"{module}.py"
        path.write_bytes(source.encode() if isinstance(source, str) else source)
        found.append((module, path))
    monkeypatch.setattr(docstrings, "_source_files", lambda: sorted(found))


def test_functions_methods_and_classes_with_enough_to_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(tmp_path, monkeypatch, {"pack.mod": SOURCE})
    scan = scan_docstrings()
    assert [row.id for row in scan.rows] == [
        "pack.mod:Thing",
        "pack.mod:Thing.method",
        "pack.mod:guarded",
        "pack.mod:later",
        "pack.mod:plain",
    ]
    assert scan.rows[2] == ("pack.mod:guarded", "pack.mod", "pack", "Return the guarded thing.", LONG)
    assert read_docstrings() == []  # all share a body


def test_files_that_cannot_be_parsed_are_counted_and_warnings_kept_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = LONG.replace("body", "second body")
    files: dict[str, str | bytes] = {
        "a.good": f'"""Doc."""\nx = "\\d"\ndef f():\n    """Return one good thing. {LONG}"""\n',
        "b.broken": 'def f(:\n    """x"""\n',
        "c.nul": b'"""x"""\x00\n',
        "d.bytes": b'"""caf\xe9"""\n',
        "e.latin": f'# -*- coding: latin-1 -*-\ndef f():\n    """Return one café thing. {other}"""\n'.encode("latin-1"),
        "f.none": "x = 1\n",
    }
    packages(tmp_path, monkeypatch, files)
    scan = scan_docstrings()
    assert [path.name for path in scan.unreadable] == ["b.broken.py", "c.nul.py", "d.bytes.py"]
    assert [row.summary for row in scan.rows] == ["Return one good thing.", "Return one café thing."]
    assert scan.files == 6


def test_progress_counts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(tmp_path, monkeypatch, {"a": "", "b.c": SOURCE, "d": ""})
    calls: list[tuple[int, int]] = []
    scan_docstrings(["a", "b"], lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


def test_standard_library_packages_give_the_same_rows_each_time() -> None:
    names = ["email", "json", "logging"]
    rows = read_docstrings(names)
    assert rows == read_docstrings(names)
    assert len(rows) > 100
    assert {row.package for row in rows} == set(names)
    assert [row.id for row in rows] == sorted({row.id for row in rows})
    for row in rows:
        assert row.id.startswith(f"{row.module}:")
        assert not any(char.isspace() for char in row.id)
        assert 4 <= len(row.summary.split()) <= 60
        assert len(row.body.split()) >= 15
    assert len({normalise(row.summary) for row in rows}) == len({normalise(row.body) for row in rows}) == len(rows)
    summaries = {row.id: row.summary for row in rows}
    assert summaries["json:load"] == (
        "Deserialize ``fp`` (a ``.read()``-supporting file-like object containing a JSON document) to a Python object."
    )


def test_sources_are_the_library_and_what_llara_needs_without_tests() -> None:
    modules = [module for module, _ in docstrings._source_files()]
    found = {module.partition(".")[0] for module in modules}
    assert {"json", "asyncio", "numpy", "torch", "transformers", "rich"} <= found
    assert not found & {"test", "idlelib", "pytest", "_pytest", "mypy", "ruff", "llara"}
    assert not [module for module in modules if ".tests." in module or module.startswith("unittest.test.")]
    assert modules == sorted(set(modules))


def test_the_collection_splits_by_module() -> None:
    rows = read_docstrings(["email", "json", "logging", "asyncio"])
    collection: DocstringCollection = docstring_collection(rows)
    documents = {document.id: document for document in collection.documents()}
    assert [document.text for document in documents.values()] == [row.body for row in rows]
    assert all(document.title == "" for document in documents.values())
    assert len(collection.queries()) == len(rows) == sum(len(collection.queries(name)) for name in collection.splits)
    for name in collection.splits:
        queries = collection.queries(name)
        assert queries
        assert {split_by_module(documents[query.id].metadata["module"]) for query in queries} == {name}
        assert collection.qrels(name) == [Qrel(query.id, query.id, 1) for query in queries]
    with pytest.raises(DataError, match="installed packages: no split 'tset'"):
        collection.qrels("tset")
