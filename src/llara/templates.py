"""Templates: the strings and slots around a text. Prompts live here, and those of rerankers in `pairs.py`.

A template has two sides, one for queries and one for passages. Where both share a prefix they are *branches* over one
text: SELF is the passage side, NEXT the query side, since a relevant passage is a plausible next sentence of a query
(Llama2Vec, section 3). A *slot* is a position whose hidden state is read as embedding; slots always end a side.

A template of an encoder has no slots: its vector is the state of the first token (`cls`) or the mean over all tokens
(`mean`), and a text stands between the special tokens that its tokenizer adds by itself, such as [CLS] and [SEP].

No token id is written down here: ids come from the tokenizer that a template is bound to.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from llara.errors import ConfigError, DataError, ModelError, nearest

SideName = Literal["query", "passage"]
Pooling = Literal["mean_of_slots", "cls", "mean"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
EOS = "{eos}"  # in a template's slots: the model's own end-of-sequence token


@dataclass(frozen=True)
class Side:
    """One side of a template: `prefix` + text + `suffix` + slots.

    `joint` tokenises prefix and text as one string, as systems do that format the text before tokenising; it matters
    for tokenizers that treat the start of a string specially.
    """

    prefix: str
    suffix: str
    slots: tuple[str, ...]
    joint: bool = False


@dataclass(frozen=True)
class Template:
    """Both sides, and what adaptation needs to know of them.

    `loss_scale` is the factor on the EBAE and EBAR losses that the template's recipe uses. `pooling` says which states
    become the vector, and so what kind of model it is for; `normalise`, whether vectors have unit length.
    """

    name: str
    query: Side
    passage: Side
    loss_scale: float = 1.0
    pooling: Pooling = "mean_of_slots"
    normalise: bool = True

    @property
    def encoder(self) -> bool:
        """Whether it is for encoders, whose positions see the whole text; else for causal decoders."""
        return self.pooling != "mean_of_slots"

    @property
    def branches(self) -> bool:
        """Whether both sides can share one text in one forward pass, which adaptation needs."""
        sides = (self.query, self.passage)
        same_start = self.query.prefix == self.passage.prefix and not any(side.joint for side in sides)
        return (
            not self.encoder
            and same_start
            and (self.query.suffix, self.query.slots) != (self.passage.suffix, self.passage.slots)
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values that `from_dict` reads back."""
        plain = asdict(self)
        for side in ("query", "passage"):
            plain[side]["slots"] = list(plain[side]["slots"])
        # What is as ever stays unsaid: contracts that were saved before it could be said keep their fingerprints.
        for name in ("pooling", "normalise"):
            if plain[name] == _DEFAULTS[name]:
                del plain[name]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Template":
        """Reads a template from JSON or TOML values; `source` names the file in errors.

        Raises:
            ConfigError: Fields that are missing, unknown, or of the wrong type; all of them at once.
        """
        problems = _unknown(values, ("name", "query", "passage", "loss_scale", "pooling", "normalise"), source)
        name, scale = values.get("name"), values.get("loss_scale", 1.0)
        pooling, normalise = (values.get(key, default) for key, default in _DEFAULTS.items())
        if not isinstance(name, str) or not name:
            problems.append(f"{source}: name must be a string")
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
            problems.append(f"{source}: loss_scale must be a number above 0")
        if pooling not in POOLINGS:
            problems.append(f"{source}: pooling must be one of {', '.join(POOLINGS)}")
        if not isinstance(normalise, bool):
            problems.append(f"{source}: normalise must be true or false")
        encoder = pooling in POOLINGS[1:]
        sides = {}
        for key in ("query", "passage"):
            try:
                sides[key] = _side(values.get(key), f"{source}: [{key}]", encoder=encoder)
            except ConfigError as error:
                problems.extend(error.problems)
        if problems:
            raise ConfigError(problems)
        return cls(str(name), sides["query"], sides["passage"], float(scale), pooling, normalise)


_DEFAULTS: dict[str, Any] = {"pooling": Template.pooling, "normalise": Template.normalise}


def _unknown(values: Mapping[str, Any], known: Sequence[str], source: str) -> list[str]:
    return [f"{source}: unknown key {key!r}{nearest(key, known)}" for key in values if key not in known]


def _side(values: Any, source: str, *, encoder: bool) -> Side:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source} is missing; it needs prefix, suffix and {'no ' if encoder else ''}slots")
    problems = _unknown(values, ("prefix", "suffix", "slots", "joint"), source)
    prefix, suffix, joint = values.get("prefix", ""), values.get("suffix", ""), values.get("joint", encoder)
    slots = values.get("slots", () if encoder else None)
    if not isinstance(prefix, str) or not isinstance(suffix, str):
        problems.append(f"{source} prefix and suffix must be strings")
    if not isinstance(joint, bool):
        problems.append(f"{source} joint must be true or false")
    if encoder:
        if slots not in ([], ()):
            problems.append(f"{source} slots are read of decoders; with pooling cls or mean, leave them out")
    elif not isinstance(slots, list | tuple) or not slots or not all(isinstance(each, str) and each for each in slots):
        problems.append(f'{source} slots must be a list of at least one token, such as ["{EOS}"]')
    if problems:
        raise ConfigError(problems)
    return Side(prefix, suffix, tuple(slots or ()), joint)


PAPER = Template(
    "paper",
    query=Side("", " The next sentence: ", (EOS,)),
    passage=Side("", " The original sentence: ", (EOS,)),
)
# What the published LLARA checkpoints were trained with; FlagEmbedding, LLARA/pretrain and LLARA/finetune.
RELEASE = Template(
    "release",
    query=Side('"', '", predict the following passage within eight words: ', tuple(f"<s{i}>" for i in range(9, 17))),
    passage=Side('"', '", summarize the above passage within eight words: ', tuple(f"<s{i}>" for i in range(1, 9))),
    loss_scale=0.1,
)
# Fine-Tuning LLaMA for Multi-Stage Text Retrieval, section 3.1.
REPLLAMA = Template(
    "repllama",
    query=Side("query: ", "", (EOS,), joint=True),
    passage=Side("passage: ", "", (EOS,), joint=True),
)
PLAIN = Side("", "", (), joint=True)
# Encoders without a prompt, by what they were trained with: SimLM and its like, GTR and its like.
CLS = Template("cls", PLAIN, PLAIN, pooling="cls")
MEAN = Template("mean", PLAIN, PLAIN, pooling="mean")
# Text Embeddings by Weakly-Supervised Contrastive Pre-training (Wang et al., 2022), and its models' cards.
E5 = Template("e5", Side("query: ", "", (), joint=True), Side("passage: ", "", (), joint=True), pooling="mean")
# The English models' card; passages have no prompt.
BGE = Template(
    "bge", Side("Represent this sentence for searching relevant passages: ", "", (), joint=True), PLAIN, pooling="cls"
)
# Its published checkpoints are compared by inner products of vectors as they are.
RETROMAE = Template("retromae", PLAIN, PLAIN, pooling="cls", normalise=False)
DECODERS = (PAPER, RELEASE, REPLLAMA)
ENCODERS = (E5, BGE, RETROMAE, CLS, MEAN)
TEMPLATES = {template.name: template for template in (*DECODERS, *ENCODERS)}


def load_template(name: str) -> Template:
    """Returns a built-in template by name, or reads one from a TOML file.

    Raises:
        ConfigError: Neither a known name nor a file, or a file whose fields do not fit.
        DataError: A file that is no TOML.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        known = ", ".join(TEMPLATES)
        raise ConfigError(f"--template: {name!r} is neither a file nor one of {known}{nearest(name, TEMPLATES)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(path, None, f"is not valid TOML: {error}") from error
    return Template.from_dict(values, str(path))


class BoundSide(NamedTuple):
    """A side in token ids: `prefix` + text + `suffix`, the last `slots` ids being the slots; an encoder has none.

    A joint prefix comes with the text; `joint_length` is how many tokens it takes on its own.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    slots: int
    joint_prefix: str
    joint_length: int = 0

    @property
    def overhead(self) -> int:
        """Tokens that the side adds to a text."""
        return len(self.prefix) + self.joint_length + len(self.suffix)


def missing_tokens(template: Template, tokenizer: Any) -> list[str]:
    """Returns the slot tokens that the tokenizer lacks, in slot order; EOS stands as `</s>` where there is none."""
    vocabulary = tokenizer.get_vocab()
    missing: dict[str, None] = {}
    for slot in (*template.passage.slots, *template.query.slots):
        if slot == EOS:
            if tokenizer.eos_token_id is None:
                missing["</s>"] = None
        elif slot not in vocabulary:
            missing[slot] = None
    return list(missing)


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Returns the token ids of each text, nothing added; a special token that it spells counts only where `special`."""
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=not special,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def special_frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the special tokens that a tokenizer itself puts in front of a text, and behind it.

    Raises:
        ModelError: It does something else with a text.
    """
    (text,), whole = tokenize(tokenizer, ["a"]), tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return tuple(whole[:start]), tuple(whole[start + len(text) :])
    raise ModelError("the tokenizer changes a text where it adds its special tokens, so these cannot be told apart")


class BoundTemplate:
    """A template bound to a tokenizer: turns texts into token ids, and never truncates prompt, slots or EOS.

    Args:
        template: The template.
        tokenizer: A Hugging Face tokenizer that has every slot token (see `missing_tokens`).
        bos: Whether every text starts with the tokenizer's BOS token.

    Raises:
        ModelError: The tokenizer lacks a slot token, or BOS is asked for and there is none; of an encoder, it adds no
            special tokens that could be told from the text, or none in front for `cls` to read.
    """

    def __init__(self, template: Template, tokenizer: Any, *, bos: bool) -> None:
        if bos and tokenizer.bos_token_id is None:
            raise ModelError("BOS is asked for, but the tokenizer has no BOS token; use --bos no")
        missing = missing_tokens(template, tokenizer)
        if missing:
            raise ModelError(
                f"the tokenizer lacks {', '.join(missing)}, the slot tokens of template {template.name!r}; "
                "adaptation and fine-tuning add them"
            )
        self.template = template
        self.tokenizer = tokenizer
        self._before, self._after = self._frame(bos)
        self.query = self._bind(template.query)
        self.passage = self._bind(template.passage)

    def _frame(self, bos: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns what stands at the very start and end of each row."""
        if not self.template.encoder:
            return (self.tokenizer.bos_token_id,) if bos else (), ()
        before, after = special_frame(self.tokenizer)
        if not before and self.template.pooling == "cls":
            raise ModelError(
                f"the tokenizer puts no token in front of a text, and template {self.template.name!r} reads the first "
                "one; give a --template with mean pooling"
            )
        return before, after

    def _bind(self, side: Side) -> BoundSide:
        prefix = [] if side.joint or not side.prefix else self._tokenize([side.prefix], special=True)[0]
        suffix = self._tokenize([side.suffix], special=True)[0] if side.suffix else []
        slots = [
            self.tokenizer.eos_token_id if slot == EOS else self.tokenizer.convert_tokens_to_ids(slot)
            for slot in side.slots
        ]
        joint_prefix = side.prefix if side.joint else ""
        joint_length = len(self._tokenize([joint_prefix])[0]) if joint_prefix else 0
        before, after = (*self._before, *prefix), (*suffix, *slots, *self._after)
        return BoundSide(before, after, len(slots), joint_prefix, joint_length)

    def _tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        # A prompt may name special tokens; a text that spells "</s>" or "<s1>" must not be able to place a slot.
        return tokenize(self.tokenizer, texts, special=special)

    def side(self, name: SideName) -> BoundSide:
        """Returns one side in token ids."""
        return self.query if name == "query" else self.passage

    def overhead(self, name: SideName) -> int:
        """Returns how many tokens a side adds to a text (of a joint prefix, as many as it has on its own)."""
        return self.side(name).overhead

    def text_ids(self, texts: Sequence[str], name: SideName) -> list[list[int]]:
        """Returns each text's own token ids, a joint prefix included, nothing else added or cut."""
        side = self.side(name)
        if not texts:
            return []
        return self._tokenize([side.joint_prefix + text for text in texts])

    def wrap(self, text_ids: Sequence[int], name: SideName, max_length: int) -> list[int]:
        """Returns prefix + text + suffix in at most `max_length` tokens; only the text is ever cut.

        Raises:
            ConfigError: Prompt and slots alone fill `max_length`.
        """
        side = self.side(name)
        if max_length <= side.overhead:
            raise ConfigError(
                f"a {name} length of {max_length} tokens leaves no room for text: "
                f"template {self.template.name!r} itself takes {side.overhead}"
            )
        room = max_length - len(side.prefix) - len(side.suffix)  # a joint prefix is part of `text_ids`
        return [*side.prefix, *text_ids[:room], *side.suffix]

    def encode(self, texts: Sequence[str], name: SideName, max_length: int) -> list[list[int]]:
        """Returns the token ids of each text within the template, each at most `max_length` long."""
        return [self.wrap(ids, name, max_length) for ids in self.text_ids(texts, name)]

    def unwrap(self, row: Sequence[int], name: SideName) -> list[int]:
        """Returns the token ids of the text within a row that `wrap` made: prefix, joint or not, and suffix left out.

        A joint prefix may share its last token with the text ("query: " + "why" ends in one token " why"): that token
        is the text's.
        """
        side = self.side(name)
        ids = list(row[len(side.prefix) : len(row) - len(side.suffix)])
        alone = self._tokenize([side.joint_prefix])[0] if side.joint_prefix else []
        shared = 0
        while shared < min(len(alone), len(ids)) and alone[shared] == ids[shared]:
            shared += 1
        return ids[shared:]
