"""Command line to configuration. The only module that knows cyclopts.

Every field of a job's configuration becomes a flag, with the field's docstring as its help. Nothing is required as
far as cyclopts is concerned: it stops at the first fault, while we report unknown flags, missing flags and settings
that do not fit together, all at once.
"""

import ast
import importlib
import inspect
import itertools
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import cyclopts
from cyclopts import App, Group, Parameter, Token
from cyclopts.config import Dict as ConfigDict
from cyclopts.exceptions import CoercionError, CycloptsError, MissingArgumentError, RepeatArgumentError

from llara import __version__
from llara.cli.table import COMMANDS, Command, group
from llara.config import JobConfig
from llara.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes beside its configuration."""

    config: Path | None = None
    """TOML file with any of these settings, under their names; flags override it."""
    json: bool = False
    """Print the result as one JSON object."""
    quiet: bool = False
    """No progress and no notes."""
    print_config: bool = False
    """Print the effective settings as TOML and stop."""


class Parsed(NamedTuple):
    """A command line that fits: which command, with what."""

    command: Command
    config: JobConfig
    options: Options


# Help shows a command's own flags first, then those it shares with others: by the class that a field belongs to.
PLAN = Group("Plan", sort_key=0)
OWN = Group("Flags", sort_key=1)
EVERY = Group("Flags of every command", sort_key=4)
GROUPS = {
    "ModelConfig": Group("Model", sort_key=2),
    "TrainConfig": Group("Training", sort_key=3),
    "PlanConfig": PLAN,
    "FleetConfig": PLAN,
    "JobConfig": EVERY,
    "Options": EVERY,
}


def parse(argv: Sequence[str]) -> Parsed | None:
    """Returns what the command line asks for, or None where it asked for a command's help, which is then printed.

    Raises:
        ConfigError: everything that is wrong with flags, the TOML file and the settings they come to.
    """
    tokens = _globals_last(argv)
    command = _command_of(tokens)
    tokens, unknown = _without_unknown(config_class(command), tokens[len(command.words) :])
    try:
        function, bound, unused, _ = build_app(command).parse_known_args([_key(command), *tokens])
    except CycloptsError as error:
        raise ConfigError([*unknown, _explain(error)]) from None
    if not hasattr(function, "command"):
        function(*bound.args, **bound.kwargs)  # help and version are functions to cyclopts, too
        return None
    strangers = [f"{token}: not expected here; a text with blanks needs quotes" for token in unused]
    return _settle(command, bound.arguments, [*unknown, *strangers])


def build_app(command: Command) -> App:
    """Returns the cyclopts app with one command: the others cost time, and the command line names only one."""
    app = App(
        name="llara",
        version=f"llara {__version__}",
        default_parameter=Parameter(negative=(), consume_multiple=True),
        config=_read_toml,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        help_format="plaintext",
    )
    app.command(_function(command), name=_key(command), help=command.help, usage=command.usage)
    return app


def _key(command: Command) -> str:
    """One word, by which cyclopts knows the command: to it, two would be a command within a command."""
    return "-".join(command.words)


def _command_of(tokens: Sequence[str]) -> Command:
    """Returns the command that the first words name, or says which is nearest."""
    for command in COMMANDS:
        if tuple(tokens[: len(command.words)]) == command.words:
            return command
    word = tokens[0] if tokens else ""
    if word.startswith("-"):
        raise ConfigError(f"{word}: needs a command, and goes behind it; see llara --help")
    within = group(word)
    listed = ", ".join(command.name for command in within)
    if within and (len(tokens) == 1 or tokens[1].startswith("-")):
        raise ConfigError(f"{word}: needs a job: {listed}; see llara {word} --help")
    if within:
        raise ConfigError(f"{word} {tokens[1]}: unknown command; there are {listed}")
    raise ConfigError(f"{word}: unknown command{nearest(word, [c.name for c in COMMANDS])}; see llara --help")


def config_class(command: Command) -> type[JobConfig]:
    """Returns the configuration class of a command."""
    module, _, name = command.config.rpartition(":")
    found: type[JobConfig] = getattr(importlib.import_module(module or "llara.config"), name)
    return found


def field_help(cls: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = _class_bodies(inspect.getsourcefile(base) or "")[base.__name__]
        for field, docstring in itertools.pairwise(body):
            match field, docstring:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


_bodies: dict[str, dict[str, list[ast.stmt]]] = {}


def _class_bodies(path: str) -> dict[str, list[ast.stmt]]:
    if path not in _bodies:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        _bodies[path] = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
    return _bodies[path]


def _function(command: Command) -> Callable[..., None]:
    """Returns a function whose signature is the flat list of a command's flags, for cyclopts to read."""

    def stand_in(**settings: Any) -> None:
        raise AssertionError("only its signature is used")

    parameters = [*_parameters(config_class(command), command.positional), *_parameters(Options, None)]
    parameters.sort(key=lambda p: p.kind)
    stand_in.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    stand_in.__annotations__ = {p.name: p.annotation for p in parameters}
    stand_in.command = command  # type: ignore[attr-defined]
    return stand_in


def _parameters(cls: type, positional: str | None) -> Iterator[inspect.Parameter]:
    texts, types = field_help(cls), get_type_hints(cls)
    owner = {name: base.__name__ for base in reversed(cls.__mro__) for name in getattr(base, "__annotations__", {})}
    for field in fields(cls):
        is_positional = field.name == positional
        help_text = texts[field.name] + (" [required]" if field.default is MISSING else "")
        default = None if field.default is MISSING else field.default
        shown = default not in (None, "", (), False)
        flag = Parameter(
            help=help_text,
            group=GROUPS.get(owner[field.name], OWN),
            negative=f"--no-{field.name.replace('_', '-')}" if default is True else (),
            show_default=(lambda value: _shown(value)) if shown else False,
            converter=_whole if types[field.name] in (int, int | None, tuple[int, ...]) else None,
        )
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if is_positional else inspect.Parameter.KEYWORD_ONLY
        annotation = (
            Annotated[types[field.name] | None, flag] if default is None else Annotated[types[field.name], flag]
        )
        yield inspect.Parameter(field.name, kind, default=default, annotation=annotation)


def _whole(hint: Any, tokens: Sequence[Token]) -> Any:
    """Converts as cyclopts does, but for what it would round: 2.5 is no number of steps."""
    for token in tokens:
        try:
            whole = "." not in token.value or float(token.value).is_integer()
        except ValueError:
            whole = True  # whatever it is, cyclopts will say
        if not whole:
            raise CoercionError(token=token, target_type=int)
    return cyclopts.convert(hint, tokens)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _globals_last(argv: Sequence[str]) -> list[str]:
    """Moves flags in front of the command behind it, so that `llara --json doctor` works, too."""
    found = (
        (at, len(command.words))
        for at in range(len(argv))
        for command in COMMANDS
        if tuple(argv[at : at + len(command.words)]) == command.words
    )
    at, words = next(found, (0, 1))
    before = argv[:at]
    if not all(
        token.startswith("--") or previous == "--config" for previous, token in itertools.pairwise(["", *before])
    ):
        return list(argv)
    return [*argv[at : at + words], *before, *argv[at + words :]]


def _settle(command: Command, given: dict[str, Any], unknown: Sequence[str]) -> Parsed:
    """Makes the configuration, or raises with everything that is wrong."""
    cls = config_class(command)
    option_names = {f.name for f in fields(Options)}
    settings = {name: value for name, value in given.items() if name not in option_names}
    problems = [*unknown, *_missing(cls, settings)]
    config: JobConfig | None = None
    try:
        # Placeholders for what is missing let the other checks speak in the same breath.
        config = cls(**{f.name: _placeholder(f.type) for f in fields(cls) if f.default is MISSING} | settings)
    except ConfigError as error:
        known = {problem.partition(":")[0] for problem in problems}
        problems += [problem for problem in error.problems if problem.partition(":")[0] not in known]
    if problems or config is None:
        raise ConfigError(problems)
    return Parsed(command, config, Options(**{k: v for k, v in given.items() if k in option_names}))


def _placeholder(kind: Any) -> Any:
    return () if get_origin(kind) is tuple else Path()


def _missing(cls: type[JobConfig], settings: dict[str, Any]) -> Iterator[str]:
    for field in fields(cls):
        if field.default is MISSING and settings.get(field.name) in (None, ()):
            yield f"{_flag(field.name)}: is required"


def _without_unknown(cls: type[JobConfig], tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes unknown flags and their values out of a command line; returns the rest, and one problem per flag."""
    known = {"--help", "-h", "--version", *(_flag(f.name) for f in (*fields(cls), *fields(Options)))}
    known |= {"--no-" + _flag(f.name)[2:] for f in fields(cls) if f.default is True}
    kept: list[str] = []
    problems: list[str] = []
    dropping = False
    for at, token in enumerate(tokens):
        if token == "--":
            return kept + list(tokens[at:]), problems
        name = token.partition("=")[0]
        if name.startswith("-") and (name[1:2].isalpha() or name.startswith("--")):
            dropping = name.replace("_", "-") not in known
            if dropping:
                problems.append(f"{name}: unknown flag{nearest(name, known - {'-h'})}")
                dropping = "=" not in token
                continue
        if not dropping:  # what follows an unknown flag is its value, and no fault of its own
            kept.append(token)
    return kept, problems


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_toml(app: App, commands: tuple[str, ...], arguments: cyclopts.ArgumentCollection) -> None:
    """Puts the settings of `--config FILE` under the flags; cyclopts calls it between reading and converting."""
    file = arguments.get("--config")
    if file is None or not file.tokens:
        return
    path = Path(file.tokens[0].value)
    command = next(c for c in COMMANDS if _key(c) == commands[-1])
    settings = _load_toml(path, [f.name for f in fields(config_class(command))])
    # Wrapped under the command's name: as a flat file, cyclopts would drop keys that are also names of commands.
    ConfigDict({commands[-1]: settings}, source=str(path))(app, commands[-1:], arguments)


def _load_toml(path: Path, known: Sequence[str]) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (--config)") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    names = {key: key.replace("-", "_") for key in settings}
    problems = [
        f"{path}: unknown key {key!r}{nearest(name, known)}" for key, name in names.items() if name not in known
    ]
    problems += [
        f"{path}: {key!r} must be one value or a list, not a table"
        for key, name in names.items()
        if name in known and isinstance(settings[key], dict)
    ]
    if problems:
        raise ConfigError(problems)
    return {names[key]: value for key, value in settings.items()}


def _explain(error: CycloptsError) -> str:
    """Says in our style what cyclopts found wrong with one value."""
    error.verbose = False
    if isinstance(error, CoercionError) and error.token is not None:
        token, wanted = error.token, error.target_type
        from_flag = token.source == "cli" or not token.keyword
        where = token.keyword or _flag(error.argument.field_info.name if error.argument else "")
        where = where if from_flag else f"{token.source}: {(token.keyword or '').strip('[]')}"
        if get_origin(wanted) is Literal:
            choices = [str(choice) for choice in get_args(wanted)]
            return f"{where}: must be one of {', '.join(choices)}; got {token.value!r}{nearest(token.value, choices)}"
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(wanted or object, "one value")
        return f"{where}: must be {kind}, got {token.value!r}"
    if isinstance(error, RepeatArgumentError):
        return f"{error.token.keyword}: given more than once"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{error.argument.name}: needs a value"
    return " ".join(str(error).split())
