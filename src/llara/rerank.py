"""The job `rerank`: the first hits of a run, scored anew by a reranker, each together with its query.

Queries go through in windows, each of which becomes a file in `OUTPUT.partial` when it is done. A window is fixed by
the run and the depth alone, and no batch crosses its border: a run that was stopped and goes on ends with the same
bytes.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llara.config import RerankConfig
from llara.contract import RERANKER, refuse_other_form
from llara.data import Judged, Run, open_collection, rank_hits, read_judged, read_queries
from llara.data.lines import digest
from llara.data.trec import run_lines
from llara.encoding.documents import DocumentStore
from llara.encoding.manifest import MANIFEST, read_manifest
from llara.encoding.texts import open_texts
from llara.errors import ConfigError, DataError, ModelError, StorageError
from llara.files import (
    IDENTITY,
    LOCK,
    FolderLock,
    claim_output,
    disk_errors,
    foreign_folder,
    remove_leftovers,
    sha256_file,
    write_atomic,
)
from llara.fuse import relative_scores
from llara.hardware import keep_freed_memory
from llara.outputs import check_file_output, save_settings
from llara.pairs import load_pair_template
from llara.progress import Progress
from llara.records import Hit

if TYPE_CHECKING:
    from llara.reranker import Reranker

_WINDOW = 4096  # pairs, roughly: the last query of a window is never cut
DOCUMENTS, WINDOWS = "documents", "windows"  # folders in OUTPUT.partial


@dataclass(frozen=True)
class RerankResult:
    """What `rerank` wrote; `reused_queries` were scored by an earlier run that was stopped."""

    output: Path
    queries: int
    pairs: int
    reused_queries: int


class _Query(NamedTuple):
    """One query of the run: `scored` documents get a new score, hits `below` keep their order under them."""

    id: str
    text: str
    scored: list[str]
    first: list[Hit]
    below: list[Hit]


def rerank(config: RerankConfig) -> RerankResult:
    """Scores the first hits of each query anew, and writes the run in its new order.

    Raises:
        ConfigError: The corpus is missing, or a setting contradicts the model's contract.
        DataError: A bad row, or a query or document of the run that is nowhere; found before the first is scored.
        ModelError: The model is no reranker, cannot be loaded, or gives NaN.
        StorageError: A full disk, a second writer, or `OUTPUT.partial` belongs to another configuration.
    """
    inputs = [config.run, config.queries, *config.corpus, *([config.add_relevant] if config.add_relevant else [])]
    check_file_output(config.output, inputs, [path for path in config.corpus if (path / MANIFEST).is_file()])
    work = config.output.with_name(f"{config.output.name}.partial")
    refuse_other_form(config.model, RERANKER)  # now, for reading the corpus may take long
    if config.template is not None:
        load_pair_template(config.template)
    with Run(config.run) as run:
        source = _Source(config, run)
        with FolderLock(work):
            store = _open_store(config, source, work)
            source.check(store)
            result = _Job(config, source, store, work).run()
        with disk_errors(work):
            shutil.rmtree(work)
    return result


def _open_store(config: RerankConfig, source: "_Source", work: Path) -> DocumentStore:
    """Returns where texts are read. A folder in which no window was finished gives way to a corrected command."""
    remove_leftovers(work)
    if {path.name for path in work.iterdir()} - {DOCUMENTS, WINDOWS, LOCK}:
        raise foreign_folder(work)  # it will be removed in the end
    begun = any((work / WINDOWS).glob("window-*"))
    if not begun:
        with disk_errors(work):
            (work / WINDOWS / IDENTITY).unlink(missing_ok=True)
    try:
        return open_texts(source.corpus, work / DOCUMENTS, verify=config.verify)
    except StorageError:
        if begun or not (work / DOCUMENTS).exists():
            raise
        with disk_errors(work):
            shutil.rmtree(work / DOCUMENTS)  # of another corpus
        return open_texts(source.corpus, work / DOCUMENTS, verify=config.verify)


class _Source:
    """The run with the texts of its queries, window by window."""

    def __init__(self, config: RerankConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.texts = {query.id: query.text for query in read_queries(config.queries, config.split)}
        self.queries = [query_id for query_id in run.queries if self._is_wanted(query_id)]
        if not self.queries:
            raise DataError(run.path, None, f"holds no query of {config.queries}")
        self.judged: Judged | None = None
        if config.add_relevant is not None:
            self.judged = read_judged(config.queries, config.add_relevant, config.split or "train")
        self.corpus = config.corpus
        if not self.corpus:
            if open_collection(config.queries) is None:
                raise ConfigError(f"--corpus: is required, {config.queries} brings no texts along")
            self.corpus = (config.queries,)

    def windows(self) -> Iterator[list[_Query]]:
        """Yields queries until they come to `_WINDOW` pairs, in the order of the run."""
        window: list[_Query] = []
        pairs = 0
        for query_id in self.queries:
            window.append(self._query(query_id))
            pairs += len(window[-1].scored)
            if pairs >= _WINDOW:
                yield window
                window, pairs = [], 0
        if window:
            yield window

    def check(self, store: DocumentStore) -> None:
        """Refuses a run of which a document that is to be scored is not in the corpus."""
        for window in self.windows():
            pairs = [(query.id, document_id) for query in window for document_id in query.scored]
            found = store.find_all([document_id for _, document_id in pairs])
            for (query_id, document_id), position in zip(pairs, found.tolist(), strict=True):
                if position < 0:
                    raise self._unknown(query_id, document_id)

    def _is_wanted(self, query_id: str) -> bool:
        if query_id in self.texts:
            return True
        if self.config.split is not None:  # the run may be of more queries than the split judges
            return False
        reason = f"{self.config.queries} has no query with the id {query_id!r}"
        raise DataError(self.run.path, self.run.line_of(query_id), reason)

    def _query(self, query_id: str) -> _Query:
        hits, depth = self.run.hits(query_id), self.config.depth
        first = {hit.document_id: None for hit in hits[:depth]}
        relevant = self.judged.relevant.get(query_id, ()) if self.judged else ()
        scored = list(first | dict.fromkeys(relevant))
        below = [hit for hit in hits[depth:] if hit.document_id not in relevant]
        return _Query(query_id, self.texts[query_id], scored, hits[:depth], below)

    def _unknown(self, query_id: str, document_id: str) -> DataError:
        line = self.run.line_of(query_id, document_id)
        if line is None and self.judged is not None:
            return self.judged.unknown([document_id])
        return DataError(self.run.path, line, f"the corpus has no document with the id {document_id!r}")


class _Job:
    """One run over the windows, in a work folder that this process has locked."""

    def __init__(self, config: RerankConfig, source: _Source, store: DocumentStore, work: Path) -> None:
        from llara.reranker import load_reranker  # imports torch; by now the input is known to be sound

        self.config, self.source, self.store, self.folder = config, source, store, work / WINDOWS
        self.model = load_reranker(config, base=config.base, query_length=config.query_length, length=config.length)
        claim_output(self.folder, self._identity(self.model), "unfinished reranking")

    def run(self) -> RerankResult:
        """Scores the windows that are still to be done, and publishes the run."""
        total = sum(len(query.scored) for window in self.source.windows() for query in window)
        done = reused = 0
        parts: list[Path] = []
        with keep_freed_memory(), Progress("rerank", total, "pairs") as shown:
            for number, window in enumerate(self.source.windows()):
                parts.append(self.folder / f"window-{number:05d}")
                if parts[-1].exists():
                    reused += len(window)
                    done += sum(len(query.scored) for query in window)
                    shown.start_at(done)
                else:
                    write_atomic(parts[-1], self._lines(window, shown))
        write_atomic(self.config.output, (part.read_bytes() for part in parts))
        save_settings(self.config.output, self.config)
        return RerankResult(self.config.output, len(self.source.queries), total, reused)

    def _identity(self, model: "Reranker") -> dict[str, Any]:
        """Returns what decides the bytes of the run; the token budget decides but the last digits."""
        config = self.config
        texts = "\n".join(f"{query_id}\t{self.source.texts[query_id]}" for query_id in self.source.queries)
        judged = str(sorted(self.source.judged.relevant.items())) if self.source.judged else ""
        return {
            "model": model.fingerprint,
            "dtype": model.dtype,
            "contract": model.contract.to_dict(),
            "run": sha256_file(config.run),
            "queries": digest(texts.encode()).hex(),
            "corpus": read_manifest(self.store.folder)["corpus"],
            "relevant": digest(judged.encode()).hex(),
            "depth": config.depth,
            "top_k": config.top_k,
            "first_stage_weight": config.first_stage_weight,
        }

    def _lines(self, window: Sequence[_Query], shown: Progress) -> bytes:
        """Returns the run's lines for the queries of one window."""
        documents = self.store.get_all(list({each for query in window for each in query.scored}))
        pairs = [(query, documents[each]) for query in window for each in query.scored]
        scores = self.model.score(
            [query.text for query, _ in pairs],
            [document.text for _, document in pairs],
            [document.title for _, document in pairs],
            self.config.token_budget,
            shown.advance,
        )
        for (query, document), score in zip(pairs, scores, strict=True):
            if not np.isfinite(score):
                what = f"gives {score} for query {query.id!r} with document {document.id!r}"
                raise ModelError(f"{self.config.model}: {what}; try --dtype float32")
        lines, start = [], 0
        for query in window:
            found = scores[start : start + len(query.scored)].tolist()
            lines.append(run_lines(query.id, ordered(query, found, self.config)))
            start += len(query.scored)
        return b"".join(lines)


def ordered(query: _Query, scores: Sequence[float], config: RerankConfig) -> list[Hit]:
    """Returns a query's hits in their new order.

    Hits below the depth get scores in whole steps under the lowest new one, so that the file keeps their order.
    """
    hits = rank_hits(query.id, zip(query.scored, scores, strict=True))
    weight = config.first_stage_weight
    if weight:
        hits = rank_hits(query.id, relative_scores([hits, query.first], [1 - weight, weight]).items())
    floor = math.floor(hits[-1].score)
    under = [(hit.document_id, float(floor - step)) for step, hit in enumerate(query.below, 1)]
    return rank_hits(query.id, [*((hit.document_id, hit.score) for hit in hits), *under])[: config.top_k]
