"""The Python face of a model: texts in, vectors out."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llara.config import Backend, Dtype, ModelConfig
from llara.errors import ConfigError
from llara.lexical import TermOptions, TermReader, Tokens, tokenise
from llara.loading import load_model
from llara.model import EmbeddingModel, OnBatch
from llara.templates import SideName, Template
from llara.terms import Terms

Vectors = npt.NDArray[np.float32]


class Retriever:
    """Encodes queries and passages with one model, as its contract says.

    ```python
    retriever = Retriever.load("runs/scifact")
    scores = retriever.encode_queries(["why is the sky blue"]) @ retriever.encode_passages(["Air scatters ..."]).T
    ```
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model
        self._readers: dict[TermOptions, TermReader] = {}  # each has looked at the whole vocabulary

    @classmethod
    def load(
        cls,
        model: str,
        *,
        template: str | None = None,
        bos: Literal["auto", "yes", "no"] = "auto",
        dtype: Dtype = "auto",
        backend: Backend = "torch",
        device: str = "auto",
        trust_remote_code: bool = False,
        offline: bool = False,
        verify: bool = False,
    ) -> "Retriever":
        """Opens a model folder, a hub id, or `mini`; see `ModelConfig` for the arguments.

        Raises:
            ModelError: The folder is incomplete, was changed, or fails its probe.
            ConfigError: An argument contradicts the model's contract.
        """
        config = ModelConfig(
            model=str(model),
            template=template,
            bos=bos,
            dtype=dtype,
            backend=backend,
            device=device,
            trust_remote_code=trust_remote_code,
            offline=offline,
            verify=verify,
        )
        return cls.for_job(config)

    @classmethod
    def for_job(cls, config: ModelConfig, usual: Template | None = None) -> "Retriever":
        """Opens the model that a job's configuration names, see `load_model` for `usual`; raises as `load` does."""
        return cls(load_model(config, usual=usual))

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.model.dim

    @property
    def passage_length(self) -> int:
        """Tokens of a passage at most, prompt included."""
        return self.model.contract.passage_length

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors, as JSON values: two retrievers of equal identity give the same ones."""
        return {
            "model_fingerprint": self.model.fingerprint,
            "dtype": self.model.dtype,
            "dim": self.dim,
            "contract": self.model.contract.to_dict(),
        }

    def encode_queries(
        self, texts: Sequence[str], token_budget: int | None = None, on_batch: OnBatch | None = None
    ) -> Vectors:
        """Returns float32 [len(texts), dim], of unit length if the model's contract says so, as all but a few do.

        `on_batch` is called with the rows done after each batch.
        """
        _refuse_string(texts, "texts")
        return self._encode(texts, "query", token_budget, None, on_batch)

    def encode_passages(
        self,
        texts: Sequence[str],
        titles: Sequence[str] | None = None,
        token_budget: int | None = None,
        max_length: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> Vectors:
        """Returns float32 [len(texts), dim], see `encode_queries`; titles are joined as the model's contract says.

        Raises:
            ConfigError: Texts and titles differ in number, or `max_length` leaves no room for text.
        """
        return self._encode(self._join(texts, titles), "passage", token_budget, max_length, on_batch)

    def tokenise_passages(
        self,
        texts: Sequence[str],
        titles: Sequence[str] | None = None,
        max_length: int | None = None,
        with_terms: bool = False,
    ) -> Tokens:
        """Returns what `embed_passages` takes, or with `with_terms` what `embed_passages_with_terms` takes.

        `encode_passages` in two steps: one thread may tokenise the next passages while another runs the model. Raises
        as that does.
        """
        joined = self._join(texts, titles)
        if with_terms:
            return tokenise(self.model, joined, "passage", max_length)
        return Tokens(self.model.tokenise(joined, "passage", max_length))

    def embed_passages(
        self, tokens: Tokens, token_budget: int | None = None, on_batch: OnBatch | None = None
    ) -> Vectors:
        """Returns what `encode_passages` does, of passages that are tokenised."""
        vectors: Vectors = self.model.encode_rows(tokens.rows, "passage", token_budget, on_batch).numpy()
        return vectors

    def embed_passages_with_terms(
        self,
        tokens: Tokens,
        options: TermOptions | None = None,
        token_budget: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[Vectors, Terms]:
        """Returns what `encode_passages_with_terms` does, of passages that are tokenised."""
        reader = self._reader(options or TermOptions())
        vectors, terms = reader.encode_rows(tokens, "passage", token_budget, on_batch)
        return vectors.numpy(), terms

    def encode_queries_with_terms(
        self,
        texts: Sequence[str],
        options: TermOptions | None = None,
        token_budget: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[Vectors, Terms]:
        """Returns what `encode_queries` does, and the sparse vectors of the same forward pass: what NEXT says.

        Raises:
            ModelError: The model has no LM head.
        """
        _refuse_string(texts, "texts")
        return self._encode_with_terms(texts, "query", options, token_budget, None, on_batch)

    def encode_passages_with_terms(
        self,
        texts: Sequence[str],
        titles: Sequence[str] | None = None,
        options: TermOptions | None = None,
        token_budget: int | None = None,
        max_length: int | None = None,
        on_batch: OnBatch | None = None,
    ) -> tuple[Vectors, Terms]:
        """Returns what `encode_passages` does, and the sparse vectors of the same forward pass: what SELF says.

        Raises:
            ModelError: The model has no LM head.
            ConfigError: As `encode_passages` has it.
        """
        joined = self._join(texts, titles)
        return self._encode_with_terms(joined, "passage", options, token_budget, max_length, on_batch)

    def sparse_identity(self, options: TermOptions) -> dict[str, Any]:
        """Returns what decides the sparse vectors beside `identity`, as JSON values; `vocabulary` counts the terms.

        Raises:
            ModelError: The model has no LM head.
        """
        return {**vars(options), "vocabulary": len(self._reader(options).counted)}

    def _join(self, texts: Sequence[str], titles: Sequence[str] | None) -> list[str]:
        _refuse_string(texts, "texts")
        _refuse_string(titles, "titles")
        if titles is not None and len(titles) != len(texts):
            raise ConfigError(
                f"titles: {len(titles)} for {len(texts)} texts; give one per text, empty where there is none"
            )
        join = self.model.contract.join_title
        return [join(title, text) for title, text in zip(titles or [""] * len(texts), texts, strict=True)]

    def _encode(
        self,
        texts: Sequence[str],
        side: SideName,
        token_budget: int | None,
        max_length: int | None,
        on_batch: OnBatch | None,
    ) -> Vectors:
        vectors: Vectors = self.model.encode(texts, side, token_budget, max_length, on_batch).numpy()
        return vectors

    def _encode_with_terms(
        self,
        texts: Sequence[str],
        side: SideName,
        options: TermOptions | None,
        token_budget: int | None,
        max_length: int | None,
        on_batch: OnBatch | None,
    ) -> tuple[Vectors, Terms]:
        reader = self._reader(options or TermOptions())
        vectors, terms = reader.encode(texts, side, token_budget, max_length, on_batch)
        return vectors.numpy(), terms

    def _reader(self, options: TermOptions) -> TermReader:
        if options not in self._readers:
            self._readers[options] = TermReader(self.model, options)
        return self._readers[options]


def _refuse_string(values: Sequence[str] | None, name: str) -> None:
    """Raises ConfigError for one string, which is a sequence of strings too: its characters."""
    if isinstance(values, str):
        raise ConfigError(f"{name}: give a list of {name}, not one string")
