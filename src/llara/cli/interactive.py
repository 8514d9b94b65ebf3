"""The interactive search: a line in, its hits out, with model, indexes and filters kept in memory between the lines."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llara.cli.hits import Row, render_hits
from llara.cli.show import plain
from llara.conditions import Condition, parse_conditions
from llara.config import SearchConfig
from llara.errors import ConfigError, LlaraError, nearest
from llara.progress import note
from llara.search import ONE, Searcher

PROMPT = "query> "
HELP = """A line is a query. Commands:
  :k 20              show 20 hits from now on
  :filter year>=2020 only documents that fit, beside the filters there are
  :filter            drop all filters
  :help              this list
Ctrl-D ends. A query that begins with a colon is written with two."""
COMMANDS = (":k", ":filter", ":help")


@dataclass(frozen=True)
class Reply:
    """What one line gives: hits, what a command has changed, or what is wrong with it.

    Attributes:
        values: As JSON values.
        text: For people; None where `problems` say all.
        problems: What is wrong.
    """

    values: dict[str, Any]
    text: str | None = None
    problems: tuple[str, ...] = ()


@dataclass
class Conversation:
    """What holds from line to line."""

    searcher: Searcher
    top_k: int = ONE
    conditions: tuple[Condition, ...] = field(default=())

    def reply(self, line: bytes | str) -> Reply:
        """Returns the reply to a line; a mistake of the user is one, too."""
        asked = line.decode(errors="replace") if isinstance(line, bytes) else line
        asked = asked.strip()
        try:
            if isinstance(line, bytes):
                line.decode()
            if asked.startswith(":") and not asked.startswith("::"):
                return self._command(asked)
            return self._search(asked.removeprefix(":") if asked.startswith("::") else asked)
        except UnicodeError as error:
            return _mistake(asked, f"the line is not UTF-8: {error}")
        except ConfigError as error:
            return _mistake(asked, *error.problems)
        except LlaraError as error:
            return _mistake(asked, str(error))

    def _search(self, query: str) -> Reply:
        if not query:
            raise ConfigError("the line is empty: it asks nothing; :help lists the commands, Ctrl-D ends")
        began = time.perf_counter()
        found = self.searcher.ask(query, self.top_k, self.conditions).found
        seconds = round(time.perf_counter() - began, 4)
        return Reply({"query": query, "answers": plain(found), "seconds": seconds}, render_hits(map(Row._make, found)))

    def _command(self, line: str) -> Reply:
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == ":k":
            self.top_k = _whole(value)
        elif name == ":filter":
            conditions = (*self.conditions, *parse_conditions([value])) if value else ()
            self.searcher.allowed(conditions)  # a field that no document has is named here, and changes nothing
            self.conditions = conditions
        elif name != ":help":
            raise ConfigError(f"{name}: unknown command{nearest(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
        texts = [condition.text for condition in self.conditions]
        state, filters = {"top_k": self.top_k, "filter": texts}, " and ".join(texts) or "none"
        return Reply({"command": line, **state}, HELP if name == ":help" else f"hits: {self.top_k}, filter: {filters}")


def converse(config: SearchConfig, *, as_json: bool) -> int:
    """Answers the lines of standard input one by one until it ends, or until Ctrl-C; returns the exit code.

    Hits go to stdout, and messages to stderr; with `as_json` every line gives one line of JSON, also one that is wrong.
    """
    searcher = Searcher(config)
    conversation = Conversation(searcher, config.top_k or ONE, parse_conditions(config.filter))
    searcher.allowed(conversation.conditions)
    try:
        for line in _lines():
            _show(conversation.reply(line), as_json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def _lines() -> Iterator[bytes | str]:
    """Yields the lines of standard input, with a prompt where somebody types them."""
    if not sys.stdin.isatty():
        yield from iter(sys.stdin.buffer.readline, b"")  # not iterated, which would read ahead
        return
    import readline  # noqa: F401  gives `input` its editing keys and its history

    note(HELP)
    while True:
        try:
            yield input(PROMPT) if sys.stdout.isatty() else _typed()
        except UnicodeDecodeError as error:
            note(f"error: the line is not UTF-8: {error}")
        except EOFError:
            print(file=sys.stderr)
            return


def _typed() -> str:
    """Reads a line from a terminal while stdout is a file, which the prompt has no place in."""
    print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _show(reply: Reply, as_json: bool) -> None:
    if as_json:
        print(json.dumps(reply.values, ensure_ascii=False), flush=True)
        return
    for problem in reply.problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if reply.text is not None:
        print(reply.text, end="\n\n", flush=True)


def _mistake(asked: str, *problems: str) -> Reply:
    return Reply({"query": asked, "error": "; ".join(problems)}, problems=problems)


def _whole(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f":k: must be a whole number above 0, got {value!r}")
    return int(value)
