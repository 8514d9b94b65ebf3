"""The command table, in the order of the job. Reading it imports nothing but the standard library.

A command is one job: its configuration's fields are the flags, and its function is imported when it runs.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """One command, of one word or two.

    `config` names a class of llara.config, or is `module:class`; `job` is `module:function`.
    """

    name: str
    help: str
    usage: str
    config: str
    job: str
    positional: str | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the command line that name the command."""
        return tuple(self.name.split())


COMMANDS = (
    Command(
        "demo",
        "The whole job on the documentation strings of the installed packages.",
        "llara demo [--fast | --full]",
        "DemoConfig",
        "llara.demo:demo",
    ),
    Command(
        "plan adapt",
        "What `adapt` would take: tokens, steps, time, memory, disk.",
        "llara plan adapt --model BASE --corpus PATH... [--fleet 8xH100-80GB] [any flag of adapt]",
        "llara.plan.config:PlanAdaptConfig",
        "llara.plan.jobs:plan_adapt",
    ),
    Command(
        "plan encode",
        "What `encode` would take.",
        "llara plan encode --model DIR --corpus PATH... [--fleet 8xH100-80GB] [any flag of encode]",
        "llara.plan.config:PlanEncodeConfig",
        "llara.plan.jobs:plan_encode",
    ),
    Command(
        "plan index",
        "What `index` would take, also before there are vectors.",
        "llara plan index (--vectors VECTORS | --model DIR --corpus PATH... | --type bm25 --corpus PATH...)",
        "llara.plan.config:PlanIndexConfig",
        "llara.plan.jobs:plan_index",
    ),
    Command(
        "adapt",
        "Stage 1: EBAE + EBAR on plain text, no labels.",
        "llara adapt --model BASE --corpus PATH... --output DIR",
        "AdaptConfig",
        "llara.training.adapt:adapt",
    ),
    Command(
        "finetune",
        "Stage 2: contrastive learning on queries, relevant passages and hard negatives.",
        "llara finetune --model DIR --train PATH... --output DIR",
        "FinetuneConfig",
        "llara.training.finetune:finetune",
    ),
    Command(
        "encode",
        "Encode a corpus into a vectors folder.",
        "llara encode --model DIR --corpus PATH... --output VECTORS",
        "EncodeConfig",
        "llara.encoding.encode:encode",
    ),
    Command(
        "index",
        "Build a searchable index from vectors or from words; add documents to one, or delete some.",
        "llara index (--vectors VECTORS [--type flat | hnsw | ...] [--add] | --delete IDS) --output INDEX",
        "IndexConfig",
        "llara.index.job:index",
    ),
    Command(
        "search",
        "Search an index, or several at once: one query, a file of them, or line by line.",
        "llara search (TEXT | --interactive | --queries FILE --output RUN) --index INDEX [--hybrid INDEX...]",
        "SearchConfig",
        "llara.search:search",
        positional="query",
    ),
    Command(
        "rerank",
        "Score the first hits of a run anew, each together with its query.",
        "llara rerank --model DIR --run RUN --queries FILE --corpus PATH --output RUN",
        "RerankConfig",
        "llara.rerank:rerank",
    ),
    Command(
        "fuse",
        "Fuse several runs into one.",
        "llara fuse --run RUN RUN... --output RUN [--method rrf | relative]",
        "FuseConfig",
        "llara.fuse:fuse",
    ),
    Command(
        "mine",
        "Mine hard negatives for finetune, from an index or a run.",
        "llara mine (--index INDEX [--model DIR] | --run RUN) --queries FILE --qrels FILE --corpus PATH --output FILE",
        "MineConfig",
        "llara.mine:mine",
    ),
    Command(
        "evaluate",
        "Measure one or more runs against judgements.",
        "llara evaluate --run RUN... --qrels FILE",
        "EvaluateConfig",
        "llara.evaluate:evaluate",
    ),
    Command(
        "explain",
        "Which tokens an embedding says, and which two of them share.",
        "llara explain --model DIR --query TEXT... --document TEXT... [--compare MODEL] [--plot FILE]",
        "ExplainConfig",
        "llara.explain.job:explain",
    ),
    Command(
        "convert",
        "Make a folder with safetensors of weights that were published as pickles; nothing in them is run.",
        "llara convert --model MODEL --output DIR",
        "ConvertConfig",
        "llara.convert:convert",
    ),
    Command(
        "verify",
        "Recompute checksums, counts and a sample of vectors of a model, vectors or index folder.",
        "llara verify PATH",
        "VerifyConfig",
        "llara.verify:verify",
        positional="path",
    ),
    Command(
        "doctor",
        "Print versions, hardware and extras, to paste into a bug report.",
        "llara doctor",
        "JobConfig",
        "llara.doctor:doctor",
    ),
)


def group(word: str) -> tuple[Command, ...]:
    """Returns the commands of two words that begin with this one."""
    return tuple(command for command in COMMANDS if len(command.words) > 1 and command.words[0] == word)


def overview(about: str) -> str:
    """Returns the text of `llara --help`, made without cyclopts, whose import takes longer than all else."""
    return f"""Usage: llara COMMAND [FLAGS]

{about}

Commands, in the order of the job:
{_listed(COMMANDS)}

Every command takes --config FILE, --json, --quiet, --offline, --verify and --print-config.
llara COMMAND --help lists its flags; llara --version prints the version. Start with: llara demo
"""


def group_overview(word: str) -> str:
    """Returns the text of `llara plan --help`: the commands that begin with one word."""
    return f"""Usage: llara {word} JOB [FLAGS]

{_listed(group(word))}

llara {word} JOB --help lists its flags.
"""


def _listed(commands: Sequence[Command]) -> str:
    width = max(len(command.name) for command in commands)
    return "\n".join(f"  {command.name:<{width}}  {command.help}" for command in commands)
