"""How a query and a document become one row of tokens whose last state is scored: template and contract of rerankers.

Nothing but the texts is ever cut: the query to its own length, then the document to what is left.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llara.contract import join_title
from llara.errors import ConfigError, DataError, ModelError, nearest
from llara.templates import EOS, tokenize


@dataclass(frozen=True)
class PairTemplate:
    """`query` + query + `document` + document + `end`.

    Attributes:
        name: How it is called.
        query: What stands before the query.
        document: What stands before the document.
        end: Tokens at the end, of which the last is scored; without any, the document's last token is.
        joint: Both are tokenised as one string; else as two, each behind BOS.
    """

    name: str
    query: str
    document: str
    end: tuple[str, ...] = ()
    joint: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values that `from_dict` reads back."""
        return {**asdict(self), "end": list(self.end)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "PairTemplate":
        """Reads a template from JSON or TOML values; `source` names the file in errors.

        Raises:
            ConfigError: Fields that are missing, unknown, or of the wrong type; all of them at once.
        """
        known = ("name", "query", "document", "end", "joint")
        problems = [f"{source}: unknown key {key!r}{nearest(key, known)}" for key in values if key not in known]
        for key in ("name", "query", "document"):
            if not isinstance(values.get(key), str):
                problems.append(f"{source}: {key} must be a string")
        end, joint = values.get("end", ()), values.get("joint", True)
        if not isinstance(end, list | tuple) or not all(isinstance(each, str) and each for each in end):
            problems.append(f'{source}: end must be a list of tokens, such as ["{EOS}"]')
        if not isinstance(joint, bool):
            problems.append(f"{source}: joint must be true or false")
        if problems:
            raise ConfigError(problems)
        return cls(values["name"], values["query"], values["document"], tuple(end), joint)


# Fine-Tuning LLaMA for Multi-Stage Text Retrieval, section 3.2.
RANKLLAMA = PairTemplate("rankllama", "query: ", " document: ", (EOS,))
# What the published RankLLaMA checkpoints of 2023 were trained with: each part behind BOS, and no EOS.
RANKLLAMA_V1 = PairTemplate("rankllama-v1", "query: ", "document: ", (), joint=False)
PAIR_TEMPLATES = {template.name: template for template in (RANKLLAMA, RANKLLAMA_V1)}


def load_pair_template(name: str) -> PairTemplate:
    """Returns a built-in template by name, or reads one from a TOML file.

    Raises:
        ConfigError: Neither a known name nor a file, or a file whose fields do not fit.
        DataError: A file that is no TOML.
    """
    if name in PAIR_TEMPLATES:
        return PAIR_TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(PAIR_TEMPLATES)
        raise ConfigError(
            f"--template: {name!r} is neither a file nor a reranker's template, {known}{nearest(name, PAIR_TEMPLATES)}"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(path, None, f"is not valid TOML: {error}") from error
    return PairTemplate.from_dict(values, str(path))


@dataclass(frozen=True)
class PairContract:
    """What a saved reranker says about how a query and a document become a score.

    Attributes:
        template: Strings and tokens around the two texts.
        bos: Whether rows start with BOS.
        title_separator: What stands between title and text of a document; None leaves titles out.
        query_length: Tokens of the query at most, its prompt included.
        length: Tokens of the whole row at most.
    """

    template: PairTemplate = RANKLLAMA
    bos: bool = False
    title_separator: str | None = " "
    query_length: int = 64
    length: int = 256

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values that `from_dict` reads back."""
        return {**asdict(self), "template": self.template.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "PairContract":
        """Reads a contract; `source` names the file in errors.

        Raises:
            ModelError: A field is missing or unknown.
        """
        known = set(asdict(cls()))
        if set(values) != known:
            odd = ", ".join(sorted(set(values) ^ known))
            raise ModelError(f"{source}: the contract's fields do not fit this version of llara: {odd}")
        return cls(**{**values, "template": PairTemplate.from_dict(values["template"], f"{source}: template")})

    def join_title(self, title: str, text: str) -> str:
        """Returns a document's full text."""
        return join_title(self.title_separator, title, text)

    def with_lengths(self, query_length: int | None, length: int | None) -> "PairContract":
        """Returns the contract with the lengths that are given replaced."""
        return replace(self, query_length=query_length or self.query_length, length=length or self.length)


class PairEncoder:
    """A contract bound to a tokenizer: turns queries and documents into rows of token ids.

    Raises:
        ModelError: The tokenizer lacks a token that the contract asks for.
        ConfigError: The lengths leave no room for a document.
    """

    def __init__(self, contract: PairContract, tokenizer: Any) -> None:
        self.contract, self.template, self.tokenizer = contract, contract.template, tokenizer
        if contract.bos and tokenizer.bos_token_id is None:
            raise ModelError("BOS is asked for, but the tokenizer has no BOS token; use --bos no")
        self._bos = [tokenizer.bos_token_id] if contract.bos else []
        self.ends = [self._id(token) for token in self.template.end]
        # What is there beside the query with its prompt: the document's own prompt, BOS and the end.
        prompt = len(tokenize(tokenizer, [self.template.document])[0])
        self.overhead = len(self._bos) * (1 if self.template.joint else 2) + len(self.ends) + prompt
        least = contract.query_length + self.overhead
        if contract.query_length <= len(tokenize(tokenizer, [self.template.query])[0]):
            raise ConfigError(f"a query length of {contract.query_length} tokens leaves no room for a query")
        if contract.length <= least:
            raise ConfigError(
                f"a length of {contract.length} tokens leaves no room for a document: query and prompts take {least}"
            )

    def rows(self, queries: Sequence[str], documents: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each query with its document, each row at most `contract.length` long."""
        if not queries:
            return []
        if self.template.joint:
            return self._joint(queries, documents)
        cut = self.contract.query_length
        asked = tokenize(self.tokenizer, [self.template.query + query for query in queries])
        answers = tokenize(self.tokenizer, [self.template.document + document for document in documents])
        starts = [[*self._bos, *query[:cut], *self._bos] for query in asked]
        room = self.contract.length - len(self.ends)
        return [
            [*start, *answer[: room - len(start)], *self.ends] for start, answer in zip(starts, answers, strict=True)
        ]

    def _joint(self, queries: Sequence[str], documents: Sequence[str]) -> list[list[int]]:
        starts = dict(zip(dict.fromkeys(queries), self._cut(list(dict.fromkeys(queries))), strict=True))
        texts = [
            starts[query] + self.template.document + document
            for query, document in zip(queries, documents, strict=True)
        ]
        room = self.contract.length - len(self._bos) - len(self.ends)
        return [[*self._bos, *ids[:room], *self.ends] for ids in tokenize(self.tokenizer, texts)]

    def _cut(self, queries: list[str]) -> list[str]:
        """Returns each query with its prompt, cut where it takes more tokens than a query may."""
        texts = [self.template.query + query for query in queries]
        limit = self.contract.query_length
        return [
            text if len(ids) <= limit else self._shorten(text, limit)
            for text, ids in zip(texts, tokenize(self.tokenizer, texts), strict=True)
        ]

    def _shorten(self, text: str, limit: int) -> str:
        """Returns the longest start of a text within a number of tokens, found by halving: tokenizers differ in what
        they say about where a token begins in a text.
        """
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(tokenize(self.tokenizer, [text[:middle]])[0]) <= limit:
                low = middle
            else:
                high = middle - 1
        return text[:low]

    def _id(self, token: str) -> int:
        if token == EOS:
            found = self.tokenizer.eos_token_id
        else:
            found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ModelError(
                f"the tokenizer lacks {'an EOS token' if token == EOS else token}, with which template "
                f"{self.template.name!r} ends; give a --template without it"
            )
        return int(found)
