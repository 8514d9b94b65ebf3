"""How much each token counts as a target of EBAE and EBAR: stop words left out, or rare tokens weighted up."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llara.config import AdaptConfig
from llara.errors import ConfigError, DataError, nearest
from llara.training.chunks import ChunkStore

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a token decodes to that holds a part of a character
Weights = npt.NDArray[np.float32]


def target_weights(config: AdaptConfig, tokenizer: Any, chunks: ChunkStore) -> Weights | None:
    """Returns the weight of every token as a target, float32 [vocabulary]; None where all weigh the same.

    Raises:
        ConfigError: No list of stop words is known for `config.language`.
        DataError: No token of the corpus weighs anything.
    """
    frequency = chunks.document_frequency
    if config.objective == "lm" or config.targets in ("unique", "all"):
        return None
    if config.targets == "no-stopwords":
        weights = without_stop_words(tokenizer, stop_words(config.language), len(frequency))
        reason = "every token is a stop word or punctuation"
    else:
        weights = inverse_document_frequency(frequency, chunks.documents)
        reason = "every token stands in every document"
    if not weights[frequency > 0].any():
        reason = f"{reason}, so --targets {config.targets} leaves none; take --targets unique"
        raise DataError(", ".join(map(str, config.corpus)), None, reason)
    return weights


def stop_words(language: str) -> frozenset[str]:
    """Returns the stop words of a language, as bm25s lists them.

    Raises:
        ConfigError: There is no list for that language; says for which there is one.
    """
    from bm25s import stopwords

    lists = {name.removeprefix("STOPWORDS_").lower(): name for name in dir(stopwords) if name.startswith("STOPWORDS_")}
    lists["english"] = lists.pop("en_plus")  # with pronouns and auxiliary verbs; "en" is Lucene's short list
    lists.pop("en")
    if language not in lists:
        known = ", ".join(sorted(lists))
        raise ConfigError(f"--language: no stop words for {language!r}{nearest(language, lists)}; there are {known}")
    return frozenset(getattr(stopwords, lists[language]))


def without_stop_words(tokenizer: Any, words: frozenset[str], vocabulary: int) -> Weights:
    """Returns 0 for tokens that are a stop word or hold neither letter nor digit, and 1 for all others.

    A token that holds only a part of a character, as those of byte-level tokenizers may, counts as a letter.
    """
    weights = np.zeros(vocabulary, dtype=np.float32)
    for number, text in enumerate(_texts(tokenizer, min(len(tokenizer), vocabulary))):
        bare = text.strip().lower()
        content = any(char.isalnum() or char == REPLACEMENT for char in bare)
        weights[number] = content and bare not in words
    return weights


def inverse_document_frequency(frequency: npt.NDArray[np.int64], documents: int) -> Weights:
    """Returns log((documents + 1) / (frequency + 1)), at least 0, float32 of the shape of `frequency`."""
    weights = np.log((documents + 1) / (frequency + 1.0))
    return np.maximum(weights, 0).astype(np.float32)


def _texts(tokenizer: Any, count: int) -> Sequence[str]:
    """Returns what each token stands for in a text."""
    texts: Sequence[str] = tokenizer.batch_decode([[number] for number in range(count)])
    return texts
