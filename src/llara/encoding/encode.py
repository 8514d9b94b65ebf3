"""The job `encode`: a corpus and a model become a vectors folder."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llara.config import EncodeConfig, to_toml
from llara.contract import FORMAT, refuse_other_form
from llara.data import read_rows
from llara.encoding.manifest import MANIFEST, record_model
from llara.encoding.shards import write_vectors
from llara.files import foreign_folder, is_unclaimed
from llara.outputs import check_place
from llara.progress import Progress
from llara.records import Document


class EncodeResult(NamedTuple):
    """What `encode` left in the folder; `reused_shards` of the shards were finished by an earlier run."""

    output: Path
    dim: int
    shards: int
    documents: int
    rejected: int
    reused_shards: int


def encode(config: EncodeConfig) -> EncodeResult:
    """Encodes a corpus into a vectors folder; a run that was stopped goes on where it was, with identical bytes.

    A folder without a finished shard is free for another configuration, such as the corrected one after a mistake.
    Bad rows are skipped, counted, and listed in `rejected.jsonl` of the folder.

    Raises:
        DataError: A corpus file is missing, empty, unreadable or cut, or every row is a bad one.
        ModelError: The model cannot be loaded, or gives NaN.
        StorageError: A full disk, a second encoder, or a folder that belongs to another configuration or corpus.
    """
    # Before minutes go into loading a model: is there a corpus, and may this folder be written?
    check_place(config.output)
    refuse_other_form(config.model, FORMAT)
    if not is_unclaimed(config.output) and not (config.output / MANIFEST).exists():
        raise foreign_folder(config.output)
    total = sum(1 for _ in read_rows(config.corpus))
    from llara.retriever import Retriever

    retriever = Retriever.for_job(config)
    length = config.passage_length or retriever.passage_length
    with Progress("encode", total, "passages") as progress:

        def encode_shard(documents: list[Document]) -> npt.NDArray[np.float32]:
            # One call per shard: the length-sorted window is the shard, so no batch crosses its border.
            return retriever.encode_passages(
                [document.text for document in documents],
                titles=[document.title for document in documents],
                token_budget=config.token_budget,
                max_length=length,
                on_batch=progress.advance,
            )

        summary = write_vectors(
            config.output,
            read_rows(config.corpus),
            encode_shard,
            {**retriever.identity, "passage_length": length},
            retriever.dim,
            config.vector_dtype,
            config.shard_size,
            progress,
            about={"model_path": record_model(config.model, config.output)},
            extras={"config.toml": to_toml(config).encode()},
            verify=config.verify,
        )
    return EncodeResult(config.output, retriever.dim, *summary)
