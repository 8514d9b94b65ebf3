"""How to call llara again from the user's shell: what `llara` alone says depends on how this run was started."""

import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def shell_line(words: Iterable[object]) -> str:
    """Returns the line that runs llara with these arguments, quoted for a shell.

    It starts with `llara` where the shell finds one, else with the script as it was started (`.venv/bin/llara`), else
    with this interpreter and `-m llara`.
    """
    return shlex.join([*_program(), *map(str, words)])


def _program() -> list[str]:
    if shutil.which("llara"):
        return ["llara"]
    started = Path(sys.argv[0])
    if started.name in ("llara", "llara.exe") and started.is_file():
        return [sys.argv[0]]
    return [sys.executable, "-m", "llara"]
