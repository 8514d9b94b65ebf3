"""The command line: `main` runs one command and turns what happens into output, messages and an exit code.

Exit codes: 0 done, 2 the user's mistake, 1 a fault of llara, 130 stopped by Ctrl-C. Data goes to stdout, all else to
stderr. Nothing heavy is imported before a job needs it.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import llara
from llara import __version__
from llara.cli.table import group, group_overview, overview
from llara.errors import ConfigError, LlaraError

# Failures of the system that a user can mend, and that no job gave a better message for.
USER_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"llara {__version__}")
        return 0
    try:
        code = _run(arguments)
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last breath
        return code
    except ConfigError as error:
        return _mistake(*error.problems)
    except LlaraError as error:
        return _mistake(str(error))
    except KeyboardInterrupt:
        from llara.invocation import shell_line

        print(f"\nstopped; to resume: {shell_line(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read our output has closed it, as `head` does. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USER_ERRNOS:
            return _mistake(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        import traceback

        traceback.print_exc()
        print(
            "error: this is a fault of llara, not yours; please report it together with what `llara doctor` prints",
            file=sys.stderr,
        )
        return 1


def _run(arguments: list[str]) -> int:
    if arguments in ([], ["--help"], ["-h"]):
        sys.stdout.write(overview((llara.__doc__ or "").partition("\n")[0]))
        return 0
    if group(arguments[0]) and arguments[1:] in (["--help"], ["-h"]):
        sys.stdout.write(group_overview(arguments[0]))
        return 0
    from llara.cli.parse import parse
    from llara.progress import note, set_quiet

    parsed = parse(arguments)
    if parsed is None:
        return 0
    command, config, options = parsed
    if options.print_config:
        from llara.config import to_toml

        sys.stdout.write(to_toml(config))
        return 0
    set_quiet(options.quiet)
    _prepare_environment(config.offline, options.quiet)
    if getattr(config, "interactive", False):
        from llara.cli.interactive import converse

        return converse(config, as_json=options.json)  # type: ignore[arg-type]
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result, and some libraries talk as they please
        result = _job(command.job)(config)
    if os.environ.get("RANK", "0") != "0":
        return 0  # of the processes that torchrun has started, the first one reports

    from llara.cli.show import next_command, remarks, show

    show(result, as_json=options.json)
    sys.stdout.flush()
    for remark in remarks(config, result):
        note(remark)
    following = next_command(command.name, config, result)
    if following:
        note(f"next: {following}")
    return 0


def _prepare_environment(offline: bool, quiet: bool) -> None:
    """Sets what the libraries read when they are imported; so it comes before any import of theirs."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    if quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def _job(path: str) -> Callable[[Any], Any]:
    import importlib

    module, _, function = path.partition(":")
    job: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return job


def _mistake(*problems: str) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2
