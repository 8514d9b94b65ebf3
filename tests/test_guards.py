"""The shape of the package: layers, light imports, file sizes, and calls that have no place here.

Each guard first proves that it covers something, so that a moved folder cannot switch it off unnoticed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llara.cli.parse import config_class
from llara.cli.table import COMMANDS, Command
from llara.config import JobConfig

SOURCE = Path(__file__).resolve().parent.parent / "src" / "llara"
FILES = sorted(SOURCE.rglob("*.py"))

# Top to bottom. A unit (a module, or a package with all its modules) imports only units that stand before it; the
# modules of one package may import each other, but not in a circle.
LAYERS = (
    ("errors", "records", "conditions", "config"),
    (
        *("files", "outputs", "progress", "invocation", "hardware"),
        *("templates", "contract", "published", "pairs", "batching", "terms", "data"),
    ),
    (
        "onednn",
        "masks",
        "losses",
        "pooling",
        "publishing",
        "model",
        "lexical",
        "projection",
        "parity",
        "kinds",
        "hub",
        "agreement",
        "int8",
        "backends",
        "loading",
    ),
    (
        *(
            "retriever",
            "reranker",
            "encoding",
            "index",
            "fuse",
            "ranking",
            "search",
            "rerank",
            "mine",
            "explain",
            "evaluate",
        ),
        *("training", "plan", "convert", "verify", "doctor", "demo"),
    ),
    ("cli", "__main__"),
)
ORDER = [unit for layer in LAYERS for unit in layer]
NO_TORCH = {unit for layer in LAYERS[:2] for unit in layer}
STANDARD_LIBRARY_ONLY = set(LAYERS[0])
HEAVY = {"torch", "transformers", "faiss", "ray", "scipy", "numpy", "accelerate", "peft"}
MAX_LINES = 400


def module_name(path: Path) -> str:
    """`data/rows.py` -> `data.rows`, `data/__init__.py` -> `data`, the package's own `__init__.py` -> nothing."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def unit(module: str) -> str:
    return module.split(".")[0]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every absolute module name that is imported anywhere, inside functions and under TYPE_CHECKING, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(parsed(MODULES[module])):
        parts = name.split(".")
        if parts[0] == "llara":
            # `llara.data.read_rows` is a name in the module `data`; the longest module that exists is meant.
            found.add(next(m for n in range(len(parts), 0, -1) if (m := ".".join(parts[1:n])) in MODULES))
    return found - {module}


def test_the_guards_cover_every_file() -> None:
    assert len(FILES) > 20
    assert {unit(module) for module in MODULES if module} == set(ORDER), "name every unit in LAYERS, and no other"
    assert len(ORDER) == len(set(ORDER))


def test_imports_go_down_the_layers_only() -> None:
    upward = [
        f"{module} imports {target}"
        for module in MODULES
        if module
        for target in own_imports(module)
        if target and unit(target) != unit(module) and ORDER.index(unit(target)) > ORDER.index(unit(module))
    ]
    assert not upward


def test_the_guard_sees_imports_of_every_form() -> None:
    tree = ast.parse("import llara.model\ndef f():\n    from llara.cli import main\nfrom llara import __version__")
    assert list(imports(tree)) == ["llara.model", "llara.__version__", "llara.cli.main"]
    assert "config" in own_imports("cli.parse") and "progress" in own_imports("cli")


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: own_imports(module) - {""} for module in MODULES if module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph[module]:
                # A package's __init__ runs before its modules, which so depend on it without saying so.
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert done == set(graph)


def test_the_package_itself_imports_nothing_of_its_own_at_once() -> None:
    tree = parsed(SOURCE / "__init__.py")
    at_once = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert not [name for name in imports(at_once) if name.startswith("llara")]


def test_the_upper_layers_do_without_the_heavy_libraries() -> None:
    seen = 0
    for module, path in MODULES.items():
        libraries = {name.split(".")[0] for name in imports(parsed(path))}
        if unit(module) in STANDARD_LIBRARY_ONLY:
            assert libraries <= set(sys.stdlib_module_names) | {"llara"}, module
            seen += 1
        elif module and unit(module) in NO_TORCH:
            assert not libraries & {"torch", "faiss", "accelerate", "peft"}, module
            seen += 1
    assert seen > len(NO_TORCH) - 1


STARTS = ("import", "--help", "--version", "adapt --help", "adapt --modle x", "plan --help", "plan adapt --help")


@pytest.mark.parametrize("line", STARTS)
def test_starting_loads_nothing_heavy(line: str) -> None:
    script = (
        "import sys, llara\n"
        "if sys.argv[1:] != ['import']:\n"
        "    from llara.cli import main\n"
        "    code = main(sys.argv[1:])\n"
        f"loaded = sorted({HEAVY!r} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
        "assert 'llara' in sys.modules"
    )
    command = [sys.executable, "-c", script, *line.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_file_is_too_long() -> None:
    long = {str(path): n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What could run code that comes with data: pickle, eval, exec, and torch.load or numpy.load that unpickle."""
    for name in imports(tree):
        if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
            yield f"import {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in {"eval", "exec", "builtins.eval", "builtins.exec"}:
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield f"{called} with allow_pickle"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_runs_code_that_comes_with_data(path: Path) -> None:
    assert not list(forbidden(parsed(path)))


def test_the_guard_finds_each_forbidden_thing() -> None:
    code = """
from pickle import loads
eval("1")
exec("1")
torch.load(path)
torch.load(path, weights_only=False)
numpy.load(path, allow_pickle=True)
model.eval()
torch.load(path, weights_only=True)
"""
    assert len(list(forbidden(ast.parse(code)))) == 6


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_job_and_its_configuration(command: Command) -> None:
    module, _, function = command.job.partition(":")
    tree = parsed(MODULES[module.removeprefix("llara.")])
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert issubclass(config_class(command), JobConfig)
