"""The job `encode`: a corpus and a model become a vectors folder."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llara.config import EncodeConfig, to_toml
from llara.contract import FORMAT, refuse_other_form
from llara.data import read_rows
from llara.encoding.engines import choose_engine
from llara.encoding.manifest import MANIFEST, record_model
from llara.encoding.shards import write_vectors
from llara.files import LOCK, FolderLock, foreign_folder, is_unclaimed
from llara.outputs import check_place
from llara.progress import Progress


class EncodeResult(NamedTuple):
    """What `encode` left in the folder; `reused_shards` of the shards were finished by an earlier run."""

    output: Path
    dim: int
    shards: int
    documents: int
    rejected: int
    reused_shards: int


def encode(config: EncodeConfig) -> EncodeResult:
    """Encodes a corpus into a vectors folder, with sparse vectors where they are asked for.

    A run that was stopped goes on where it was, with identical bytes. A folder without a finished shard is free for
    another configuration, such as the corrected one after a mistake. Bad rows are skipped, counted, and listed in
    `rejected.jsonl` of the folder.

    Raises:
        DataError: A corpus file is missing, empty, unreadable or cut, or every row is a bad one.
        ModelError: The model cannot be loaded, gives NaN, or has no LM head for sparse vectors.
        StorageError: A full disk, a second encoder, or a folder that belongs to another configuration or corpus.
        WorkerError: A shard that keeps killing its workers, or a cluster that does not answer or has no room.
    """
    # Before minutes go into loading a model: is there a corpus, may this folder be written, and does nobody else?
    check_place(config.output)
    refuse_other_form(config.model, FORMAT)
    if not is_unclaimed(config.output) and not (config.output / MANIFEST).exists():
        raise foreign_folder(config.output)
    if (config.output / LOCK).exists():
        with FolderLock(config.output):  # held by another encoder, or left by one that was killed
            pass
    next(iter(read_rows(config.corpus)), None)
    # In the order of how long they take: who encodes, how much there is to encode, and the model.
    with choose_engine(config) as engine:
        total = sum(1 for _ in read_rows(config.corpus))
        facts = engine.facts()
        with Progress("encode", total, "documents" if config.long == "cut" else "passages") as progress:
            summary = write_vectors(
                config.output,
                read_rows(config.corpus),
                engine,  # a shard is one job: no batch crosses its border
                facts.identity,
                facts.dim,
                config.vector_dtype,
                config.shard_size,
                progress,
                about={"model_path": record_model(config.model, config.output)},
                extras={"config.toml": to_toml(_without_workers(config)).encode()},
                verify=config.verify,
            )
    return EncodeResult(config.output, facts.dim, *summary)


def _without_workers(config: EncodeConfig) -> EncodeConfig:
    """Returns the job whoever does it: the folder's bytes tell nothing of that."""
    return replace(config, engine="local", workers=None, worker_threads=None, worker_gpus=None, address=None)
