"""The job that the safety of `llara encode` is tried on: a tiny random model, a corpus with bad rows, 21 shards."""

from collections.abc import Callable
from pathlib import Path

from tests.children import Ended, command, run
from tests.encoding.helpers import corpus_lines, tree, write_corpus
from tests.tiny import save_base

SHARDS, SHARD_SIZE = 21, 6


def prepare(root: Path) -> Path:
    """Makes `corpus.jsonl` and the folder `model` in `root`."""
    rows = corpus_lines(SHARDS * SHARD_SIZE)
    rows[5], rows[40], rows[100] = b"{broken", rows[3], b""
    write_corpus(root / "corpus.jsonl", rows)
    save_tiny(root / "model")
    return root


def save_tiny(folder: Path) -> None:
    """Makes a tiny random model, in a child: drawing random numbers would start threads in a process that forks."""
    ended = run(lambda: save_base(folder) and None)
    assert ended.status == 0, ended.err


def encode(output: str, *more: object) -> Callable[[], int]:
    """Returns the command line, to be run in a folder beside `corpus.jsonl`: so equal runs have equal bytes.

    Passages are cut short and batches are small, so that every shard has several batches.
    """
    flags = ["--shard-size", SHARD_SIZE, "--token-budget", 256, "--passage-length", 96, "--sparse", "--offline"]
    given = ["--model", "../model", "--corpus", "../corpus.jsonl", "--output", output, "--device", "cpu"]
    return command("encode", *given, *flags, "--json", *more)


def undisturbed(root: Path, name: str = "undisturbed") -> dict[str, str]:
    """Runs the job once and returns the SHA-256 of every file."""
    folder = root / name
    folder.mkdir()
    ended: Ended = run(encode("vectors"), folder)
    assert ended.status == 0, ended.err
    return tree(folder / "vectors")
