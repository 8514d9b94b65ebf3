"""BM25 over words, scored by bm25s: the baseline that needs no model."""

import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llara.encoding.arrays import open_array, write_array
from llara.errors import ConfigError, DataError, StorageError, nearest
from llara.files import FileRecord, check_file, read_json, write_json_atomic
from llara.index.base import Allowed, Asks, Floats, Manifest, Positions, StoredIds, TopK, best_first, stack
from llara.records import Document

WORDS = "words.json"
# Postings, term by term: `starts[t]` to `starts[t + 1]` are those of term t, one position and one score each.
_ARRAYS = {
    "data": ("postings.scores.npy", "float32"),
    "indices": ("postings.positions.npy", "int32"),
    "indptr": ("postings.starts.npy", "int64"),
}
_WORD = re.compile(r"(?u)\b\w\w+\b")  # as bm25s and scikit-learn cut words


class Analyzer:
    """Turns a text into terms: lower case, words of two characters or more, stop words out, stemmed.

    `language` is one that PyStemmer knows, or `none` for neither stemmer nor stop words.
    """

    def __init__(self, language: str, stop_words: Sequence[str] | None = None) -> None:
        import Stemmer

        self.language = language
        self.stop_words = frozenset(_stop_words(language) if stop_words is None else stop_words)
        self._stem = None if language == "none" else Stemmer.Stemmer(language).stemWords
        self._known: dict[str, str] = {}

    def terms(self, text: str) -> list[str]:
        """Returns the terms of a text in order, repeats included."""
        words = [word for word in _WORD.findall(text.lower()) if word not in self.stop_words]
        if self._stem is None:
            return words
        # A dictionary of stems seen makes this ten times faster; it never outgrows the vocabulary.
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        self._known.update(zip(new, self._stem(new), strict=True))
        return [self._known[word] for word in words]


def check_language(language: str) -> None:
    """Raises ConfigError, with the nearest name, when PyStemmer has no stemmer for a language."""
    import Stemmer

    known = [*Stemmer.algorithms(), "none"]
    if language not in known:
        raise ConfigError(f"--language: unknown {language!r}{nearest(language, known)}; one of {', '.join(known)}")


def _stop_words(language: str) -> Sequence[str]:
    from bm25s import stopwords

    name = "EN" if language in ("english", "porter") else language.removesuffix("_porter").upper()
    return tuple(getattr(stopwords, f"STOPWORDS_{name}", ()))


class Bm25Index:
    """BM25 with Lucene's formula (Kamphuis et al., ECIR 2020, table 1, "Lucene (accurate)").

    score(q, d) = sum over the words t of q of idf(t) * tf / (tf + k1 * (1 - b + b * |d| / average |d|)),
    idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5)); a word that a query repeats counts each time.
    """

    asks: Asks = "texts"
    model = ""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        from bm25s import BM25

        check_file(folder / WORDS, manifest.files[WORDS], full=True)  # it is read whole anyway
        words = read_json(folder / WORDS)
        self.manifest, self.ids = manifest, StoredIds(folder, manifest.count)
        self.analyzer = Analyzer(manifest.settings["language"], words["stop_words"])
        self._terms = {term: number for number, term in enumerate(words["terms"])}
        self._bm25 = BM25(k1=manifest.settings["k1"], b=manifest.settings["b"])
        self._bm25.nonoccurrence_array = None
        postings, terms = manifest.settings["postings"], manifest.settings["terms"]
        sizes = {"data": postings, "indices": postings, "indptr": terms + 1}
        self._bm25.scores = {
            name: open_array(folder / file, dtype, (sizes[name],)) for name, (file, dtype) in _ARRAYS.items()
        }
        self._bm25.scores["num_docs"] = manifest.count
        self._positions = folder / _ARRAYS["indices"][0]

    def __len__(self) -> int:
        return self.manifest.count

    def search(self, queries: Sequence[str], top_k: int, allowed: Allowed | None = None) -> TopK:
        """Returns at most `top_k` of the allowed documents per query; hits are those that share a word with it."""
        top_k = min(top_k, len(self) if allowed is None else allowed.count)
        mask = None if allowed is None else allowed.mask(0, len(self))
        return stack([self._search_one(query, top_k, mask) for query in queries], top_k)

    def score(self, queries: Sequence[str], positions: Sequence[Positions]) -> list[Floats]:
        """Returns the scores of given documents, per query int64 [n] to float32 [n]; 0 without a word in common."""
        return [self._score(query)[each] for query, each in zip(queries, positions, strict=True)]

    def _score(self, query: str) -> Floats:
        """Returns the score of every document, float32 [documents]."""
        terms = [self._terms[term] for term in self.analyzer.terms(query) if term in self._terms]
        if not terms:
            return np.zeros(len(self), np.float32)
        try:
            return np.asarray(self._bm25.get_scores_from_ids(terms), np.float32)
        except IndexError as error:  # a position beyond the last document
            raise StorageError(self._positions, f"is damaged: {error}; rebuild the index") from error

    def _search_one(self, query: str, top_k: int, mask: NDArray[np.bool_] | None) -> tuple[Floats, Positions]:
        scores = self._score(query)
        found = np.flatnonzero(scores > 0 if mask is None else (scores > 0) & mask)
        if len(found) > top_k > 0:
            found = found[scores[found] >= np.partition(scores[found], -top_k)[-top_k]]
        return best_first(scores[found], found.astype(np.int64), self.ids, top_k)


def write_bm25(
    folder: Path, documents: Iterable[Document], k1: float, b: float, language: str
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Writes the files of a BM25 index over titles and texts; returns their records and the settings.

    The postings are built in memory, about 12 bytes per word of the corpus. Raises DataError when no document has a
    word to index.
    """
    from bm25s import BM25

    analyzer = Analyzer(language)
    terms: dict[str, int] = {}
    corpus = [
        # Compact: a list of integers would take four times the memory.
        array("i", (terms.setdefault(term, len(terms)) for term in analyzer.terms(f"{each.title} {each.text}")))
        for each in documents
    ]
    if not terms:
        raise DataError(folder, None, f"the corpus holds no word to index (language {language})")
    bm25 = BM25(k1=k1, b=b, method="lucene")
    bm25.index((corpus, terms), create_empty_token=False, show_progress=False)
    files = {
        file: write_array(folder / file, bm25.scores[name].astype(dtype)) for name, (file, dtype) in _ARRAYS.items()
    }
    words = {"terms": list(terms), "stop_words": sorted(analyzer.stop_words)}
    files[WORDS] = write_json_atomic(folder / WORDS, words)
    settings = {"k1": k1, "b": b, "language": language, "terms": len(terms), "postings": len(bm25.scores["data"])}
    return files, settings
