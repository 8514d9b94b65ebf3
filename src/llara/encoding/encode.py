"""The job `encode`: a corpus and a model become a vectors folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llara.config import EncodeConfig, to_toml
from llara.contract import FORMAT, refuse_other_form
from llara.data import read_rows
from llara.encoding.engine import Encode
from llara.encoding.manifest import MANIFEST, SPARSE, record_model
from llara.encoding.shards import write_vectors
from llara.files import foreign_folder, is_unclaimed
from llara.outputs import check_place
from llara.progress import Progress
from llara.records import Document

if TYPE_CHECKING:
    from llara.lexical import TermOptions
    from llara.model import OnBatch
    from llara.retriever import Retriever


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
    identity = {**retriever.identity, "passage_length": length}
    if config.sparse:
        identity[SPARSE] = retriever.sparse_identity(term_options(config))
    with Progress("encode", total, "passages") as progress:
        summary = write_vectors(
            config.output,
            read_rows(config.corpus),
            encoder(retriever, config, length, progress.advance),  # a shard is one call: no batch crosses its border
            identity,
            retriever.dim,
            config.vector_dtype,
            config.shard_size,
            progress,
            about={"model_path": record_model(config.model, config.output)},
            extras={"config.toml": to_toml(config).encode()},
            verify=config.verify,
        )
    return EncodeResult(config.output, retriever.dim, *summary)


def term_options(config: EncodeConfig) -> "TermOptions":
    """Returns which terms a passage gets."""
    from llara.lexical import TermOptions

    return TermOptions(config.sparse_top_k, config.expansion, config.fold)


def encoder(retriever: "Retriever", config: EncodeConfig, length: int, on_batch: "OnBatch | None" = None) -> Encode:
    """Returns what turns documents into their vectors, and their terms where such are asked for, in one pass.

    Args:
        retriever: The model.
        config: The job.
        length: Tokens of a passage at most.
        on_batch: Called with the passages done after each batch.
    """
    how: dict[str, Any] = {"token_budget": config.token_budget, "max_length": length, "on_batch": on_batch}

    def encode_documents(documents: list[Document]) -> Any:
        texts, titles = ([getattr(document, part) for document in documents] for part in ("text", "title"))
        if config.sparse:
            return retriever.encode_passages_with_terms(texts, titles, term_options(config), **how)
        return retriever.encode_passages(texts, titles=titles, **how)

    return encode_documents
