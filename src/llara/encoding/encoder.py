"""Documents into numbers by one loaded model, in two steps: what an engine runs in this process or in its workers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from llara.config import EncodeConfig
from llara.encoding.arrays import Array
from llara.encoding.engine import Advance, Encoded, Found
from llara.encoding.manifest import CUT, SPARSE
from llara.encoding.passages import Cutter
from llara.encoding.pool import Facts
from llara.errors import ModelError
from llara.hardware import is_out_of_memory
from llara.records import Document

if TYPE_CHECKING:
    from llara.lexical import TermOptions, Tokens
    from llara.retriever import Retriever

T = TypeVar("T")


class Prepared(NamedTuple):
    """Documents after tokenising: how many, their passages' tokens, and where these stand; see `Encoded.passages`."""

    documents: int
    tokens: "Tokens"
    table: Array | None


class DocumentEncoder:
    """Turns documents into their vectors, and their terms where such are asked for, in one pass.

    The same in two steps, so that a thread can tokenise the next documents while the model runs: `tokenise` touches the
    tokenizer alone, `embed` the model alone.
    """

    def __init__(self, retriever: "Retriever", config: EncodeConfig) -> None:
        self.retriever, self.config = retriever, config
        self.length = config.passage_length or retriever.passage_length
        self._cutter = open_cutter(retriever, self.length, config.overlap) if config.long == "cut" else None

    @property
    def facts(self) -> Facts:
        """What decides the vectors.

        Raises:
            ModelError: Sparse vectors of a model without an LM head.
        """
        identity = {**self.retriever.identity, "passage_length": self.length}
        if self.config.sparse:
            identity[SPARSE] = self.retriever.sparse_identity(term_options(self.config))
        if self._cutter is not None:
            identity[CUT] = {"overlap": self.config.overlap}
        return Facts(identity, self.retriever.dim)

    def tokenise(self, documents: list[Document]) -> Prepared:
        """Returns what `embed` takes.

        Raises:
            ConfigError: The passage length leaves no room for text, or is beyond the model's positions.
        """
        if self._cutter is None:
            texts, titles = ([getattr(document, part) for document in documents] for part in ("text", "title"))
            table = None
        else:
            texts, titles, table = self._cutter.cut(documents)
        tokens = self.retriever.tokenise_passages(texts, titles, self.length, self.config.sparse)
        return Prepared(len(documents), tokens, table)

    def embed(self, prepared: Prepared, advance: Advance | None = None) -> Found:
        """Returns float32 [documents, dim], with sparse vectors a pair of that and the documents' terms.

        Where long documents are cut, it is what `Encoded` says.

        Args:
            prepared: The documents, tokenised.
            advance: Told after each batch how many documents it had.

        Raises:
            ModelError: Memory has run out.
        """
        count, tokens, table = prepared
        if advance is not None and table is not None:
            advance = _in_documents(advance, count, len(table))
        try:
            found = self._pass(tokens, advance)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise ModelError(_out_of_memory(self.config, error)) from error
            raise
        if table is None:
            return found
        return Encoded(*found[:2], table) if isinstance(found, tuple) else Encoded(found, None, table)

    def _pass(self, tokens: "Tokens", advance: Advance | None) -> Found:
        budget = self.config.token_budget
        if self.config.sparse:
            return self.retriever.embed_passages_with_terms(tokens, term_options(self.config), budget, advance)
        return self.retriever.embed_passages(tokens, budget, advance)

    def __call__(self, documents: list[Document]) -> Found:
        """Does both steps."""
        return self.embed(self.tokenise(documents))


def open_encoder(config: EncodeConfig, threads: int | None = None) -> DocumentEncoder:
    """Loads the model of a job, to run in so many CPU threads (None: as torch finds right); raises as `Retriever.load`.

    The threads are set for the whole process.
    """
    from llara.retriever import Retriever

    if threads:
        import torch

        torch.set_num_threads(threads)
    return DocumentEncoder(Retriever.for_job(config), config)


def open_cutter(retriever: "Retriever", length: int, overlap: int) -> Cutter:
    """Returns what cuts long documents for a model; raises as `Cutter` does."""
    model = retriever.model
    return Cutter(model.bind(), model.contract.join_title, length, overlap)


def _in_documents(advance: Advance, documents: int, passages: int) -> Advance:
    """Returns what counts documents, of as many passages each, where it is told of passages."""
    done = 0

    def count(new: int) -> None:
        nonlocal done
        before, done = done, done + new
        advance(done * documents // passages - before * documents // passages)

    return count


def term_options(config: EncodeConfig) -> "TermOptions":
    """Returns which terms a passage gets."""
    from llara.lexical import TermOptions

    return TermOptions(config.sparse_top_k, config.expansion, config.fold)


def one_ahead(make: Callable[[], T | None]) -> Iterator[T]:
    """Yields what `make` returns until that is None; the next is made in a thread while the caller works on the last.

    `make` is called in one thread at a time. What it raises is raised here, in its place.
    """
    thread = ThreadPoolExecutor(1, "ahead")
    try:
        following = thread.submit(make)
        while (made := following.result()) is not None:
            following = thread.submit(make)
            yield made
    finally:
        thread.shutdown(wait=False)  # it may be waiting for what never comes


def _out_of_memory(config: EncodeConfig, error: BaseException) -> str:
    asked = "" if config.token_budget is None else f" (now {config.token_budget:,})"
    said = (str(error).strip().splitlines() or ["no memory is left"])[0]
    return (
        f"out of memory while encoding passages: {said}. Lower --token-budget{asked}, which decides how many of them "
        "are in a pass; the same command goes on where it stopped"
    )
