"""The configurations of what a trained model is used for: vectors, run, measures; that of an index is beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llara.conditions import condition_problems
from llara.config.base import JobConfig, ModelConfig, pair_length_problems


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(ModelConfig):
    """Encode a corpus into a vectors folder."""

    corpus: tuple[Path, ...]
    """JSON lines, tsv, plain text, or a collection (BEIR folder, pairs file, SQuAD JSON)."""
    output: Path
    """The vectors folder; a run that was stopped goes on where it was."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU."""
    shard_size: int = 10_000
    """Input rows per shard."""
    passage_length: int | None = None
    """Tokens of a passage, prompt included; default: what the model folder says."""
    long: Literal["truncate", "cut"] = "truncate"
    """A document of more tokens. truncate: its beginning is encoded; cut: it becomes several passages that end with
    sentences, each with the title and a vector of its own, and a search counts a document's best passage."""
    overlap: int = 0
    """cut: tokens that a passage repeats of the one before, at most."""
    vector_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Type of the vectors on disk; int8: rounded, each with a scale of its own, a quarter of the space."""
    sparse: bool = False
    """Also store sparse vectors, read off the same forward pass: the tokens that the LM head finds likeliest at the
    slots of a passage."""
    sparse_top_k: int = 128
    """Terms of a passage at most: those of the largest weights."""
    expansion: bool = False
    """A term may be one that does not stand in the passage."""
    fold: bool = False
    """The forms of a word with a capital, or with a blank before it, are one term."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine; ray: the workers of an existing Ray cluster. The vectors are the same."""
    workers: int | None = None
    """Processes that encode, each with the model loaded; default: one per GPU, or this process alone; with --engine ray
    as many as the cluster has room for."""
    worker_threads: int | None = None
    """CPU threads per worker; default: the cores shared out among the workers of this machine; 1 with --engine ray."""
    worker_gpus: float | None = None
    """With --engine ray: GPUs per worker; default: 1 where the cluster has any and --device allows it."""
    address: str | None = None
    """With --engine ray: HOST:PORT of the cluster's head, or auto: the cluster that this machine is a node of, which it
    must be in either case."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.model else ["--model: is required (a folder, a hub id, or mini)"]),
            *([] if self.corpus else ["--corpus: is required"]),
            *self._at_least(1, "token_budget", "shard_size", "passage_length", "sparse_top_k"),
            *self._at_least(0, "overlap"),
            *self._only_with(self.long == "cut", "--long cut", "overlap"),
            *self._sparse_problems(),
            *self._worker_problems(),
        ]

    @property
    def may_use_gpus(self) -> bool:
        """Whether workers may run on whatever GPUs there are."""
        return self.device in ("auto", "cuda") and self.backend == "torch" and self.dtype != "int8"

    def _worker_problems(self) -> list[str]:
        problems = [*self._at_least(1, "workers", "worker_threads"), *self._at_least(0, "worker_gpus")]
        problems += self._only_with(self.engine == "ray", "--engine ray", "address", "worker_gpus")
        if self.engine == "ray" and not self.address:
            problems.append("--address: is required with --engine ray (HOST:PORT, or auto)")
        several = self.engine == "ray" or (self.workers or 1) > 1
        if several and self.device not in ("auto", "cpu", "cuda"):
            problems.append(f"--device: {self.device} is one device; several workers take auto, cpu or cuda")
        if self.worker_gpus and not self.may_use_gpus:
            problems.append("--worker-gpus: goes with --device auto or cuda, and weights that a GPU runs")
        if self.worker_gpus and self.worker_gpus > 1 and self.worker_gpus != int(self.worker_gpus):
            problems.append(f"--worker-gpus: above 1 it must be a whole number, got {self.worker_gpus:g}")
        return problems

    def _sparse_problems(self) -> list[str]:
        return self._only_with(self.sparse, "--sparse", "expansion", "fold", "sparse_top_k")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ModelConfig):
    """Search an index, or several at once, with a file of queries or with one query."""

    query: str | None = None
    """One query as text; its hits are printed."""
    interactive: bool = False
    """Answer queries line by line from standard input, with model and index kept in memory; with --json each line gives
    one line of JSON."""
    index: Path
    """The index folder."""
    hybrid: tuple[Path, ...] = ()
    """Indexes of other types over the same documents, searched as well; their hits are fused with those of --index."""
    queries: Path | None = None
    """Queries: JSON lines, tsv, or a collection."""
    split: str | None = None
    """Take only the queries that this split of the collection judges."""
    output: Path | None = None
    """The run, in TREC format."""
    top_k: int | None = None
    """Hits per query; default: 10 for one query, 1000 for a run."""
    filter: tuple[str, ...] = ()
    """Only documents whose metadata fits all of these: FIELD=VALUE, !=, <, <=, >, >=, or FIELD in VALUE,VALUE."""
    expansion: Literal["auto", "yes", "no"] = "auto"
    """Sparse: a term may be one that does not stand in the query; auto: as it was for the passages."""
    method: Literal["rrf", "relative"] = "rrf"
    """Hybrid, rrf: the sum of 1 / (k + rank); relative: the sum of the scores, put between 0 and 1 per query and
    index."""
    weights: tuple[float, ...] = ()
    """Hybrid: one factor per index, that of --index first; default: 1 each."""
    k: float = 60.0
    """Hybrid, rrf: the larger, the less the first ranks stand out."""
    depth: int = 1000
    """Hybrid: hits per index that are fused."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU."""
    ef_search: int | None = None
    """hnsw: candidates that a search keeps; more find more, and take longer; default: what the index says."""
    nprobe: int | None = None
    """ivfpq, rabitq: lists that a search looks into; default: what the index says."""
    refine: int | None = None
    """hnsw, ivfpq, rabitq: candidates per hit that are scored exactly; default: by type, ten for the first hits."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = [*super().problems(), *self._at_least(1, "top_k", "token_budget", "depth"), *self._at_least(0, "k")]
        problems += self._at_least(1, "ef_search", "nprobe", "refine")
        problems += self._hybrid_problems()
        problems += condition_problems(self.filter)
        if [self.query is None, self.queries is None, not self.interactive].count(False) != 1:
            problems.append("--query, --queries or --interactive: give exactly one of the three")
        if self.queries is not None and self.output is None:
            problems.append("--output: is required with --queries")
        if self.interactive and self.output is not None:
            problems.append("--output: goes with --query or --queries")
        return [*problems, *self._only_with(self.queries is not None, "--queries", "split")]

    def _hybrid_problems(self) -> list[str]:
        if not self.hybrid:
            return self._only_with(False, "--hybrid", "method", "weights", "k", "depth")
        indexes = [each.resolve() for each in (self.index, *self.hybrid)]
        problems = weight_problems(self.weights, len(indexes), "indexes")
        if len(set(indexes)) < len(indexes):
            problems.append("--hybrid: the same index is given twice")
        return problems


@dataclass(frozen=True, kw_only=True)
class MineConfig(ModelConfig):
    """Mine hard negatives: documents that rank high for a query and are not relevant to it."""

    index: Path | None = None
    """Index folder to search; flat and sparse need the model, bm25 does not."""
    run: Path | None = None
    """A run instead of an index."""
    queries: Path
    """Queries: JSON lines, tsv, or a collection, whose judgements and corpus then serve where none are given."""
    qrels: Path | None = None
    """Judgements: TREC qrels, BEIR tsv, or a collection."""
    split: str = "train"
    """Split of what is given as a collection."""
    corpus: tuple[Path, ...] = ()
    """Where the texts are: a corpus, or a vectors folder; default: what the index was built from, or the collection."""
    output: Path
    """JSON lines with query, pos, neg, pos_scores and neg_scores, for finetune."""
    negatives: int = 15
    """Negatives per query at most."""
    from_rank: int = 10
    """Best rank that a negative may have; those before it are often relevant, though nobody judged them."""
    to_rank: int = 200
    """Worst rank that a negative may have."""
    selection: Literal["random", "top"] = "random"
    """Which candidates of the ranks are taken: a sample, or the first."""
    margin: float | None = None
    """Leave out a candidate that scores above the best relevant document's score minus this."""
    relative_margin: float | None = None
    """The same, as a share of that score: 0.05 leaves out what scores above 95 % of it."""
    scores: Path | None = None
    """A run with a reranker's scores: margins then go by them, they are written as pos_scores and neg_scores, and
    documents without one are left out."""
    seed: int = 42
    """Seed of the sample; the same seed gives the same file."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = [
            *super().problems(),
            *self._at_least(1, "negatives", "from_rank", "to_rank"),
            *self._at_least(0, "margin"),
            *self._within(0, 1, "relative_margin"),
        ]
        if (self.index is None) == (self.run is None):
            problems.append("--index or --run: give exactly one of the two")
        if self.to_rank < self.from_rank:
            problems.append(f"--to-rank: {self.to_rank} comes before --from-rank {self.from_rank}")
        return problems


@dataclass(frozen=True, kw_only=True)
class RerankConfig(ModelConfig):
    """Score the first hits of a run anew, each together with its query."""

    run: Path
    """The run, in TREC format."""
    queries: Path
    """Its queries: JSON lines, tsv, or a collection, whose corpus then serves where none is given."""
    split: str | None = None
    """Take only the queries that this split of the collection judges."""
    corpus: tuple[Path, ...] = ()
    """Where the texts are: a corpus, or a folder that encode or index made."""
    output: Path
    """The reranked run; what is done lies beside it, in OUTPUT.partial, and a run that was stopped goes on there."""
    template: str | None = None
    """rankllama, rankllama-v1 (the checkpoints published in 2023), or a TOML file of your own; default: what the model
    folder says, else rankllama."""
    base: str | None = None
    """Base model of an adapter folder; default: the one that the adapter names."""
    depth: int = 200
    """Hits per query that are scored; those below stay below, in their order."""
    top_k: int | None = None
    """Hits per query that are written; default: all."""
    first_stage_weight: float = 0.0
    """From 0 to 1: how much the run's own scores count beside the new ones, each put between 0 and 1 per query."""
    add_relevant: Path | None = None
    """Judgements, whose relevant documents are scored too where the depth misses them: for scores that teach
    (mine --scores), never for a run that is measured."""
    query_length: int | None = None
    """Tokens of a query, prompt included; default: what the model folder says, else 64."""
    length: int | None = None
    """Tokens of query and document together; default: what the model folder says, else 256."""
    token_budget: int | None = None
    """Tokens per forward pass, padding included; default: 1024 on a CPU, whose caches it fits, 16384 on a GPU."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.model else ["--model: is required (a reranker's folder or hub id)"]),
            *([] if self.backend == "torch" else [f"--backend: {self.backend} runs retrievers; rerank takes torch"]),
            *self._at_least(1, "depth", "top_k", "query_length", "length", "token_budget"),
            *self._within(0, 1, "first_stage_weight"),
            *pair_length_problems(self.query_length, self.length),
        ]


@dataclass(frozen=True, kw_only=True)
class FuseConfig(JobConfig):
    """Fuse several runs into one."""

    run: tuple[Path, ...]
    """Runs in TREC format, two or more."""
    output: Path
    """The fused run, in TREC format."""
    method: Literal["rrf", "relative"] = "rrf"
    """rrf: the sum of 1 / (k + rank); relative: the sum of the scores, put between 0 and 1 per query and run."""
    weights: tuple[float, ...] = ()
    """One factor per run, in their order; default: 1 each."""
    k: float = 60.0
    """Of rrf: the larger, the less the first ranks stand out."""
    top_k: int = 1000
    """Hits per query at most."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        problems = [*super().problems(), *self._at_least(0, "k"), *self._at_least(1, "top_k")]
        problems += self._only_with(self.method == "rrf", "--method rrf", "k")
        if len(self.run) < 2:
            problems.append(f"--run: fusion takes two runs or more, got {len(self.run)}")
        return [*problems, *weight_problems(self.weights, len(self.run), "runs")]


def weight_problems(weights: Sequence[float], count: int, of: str) -> list[str]:
    """Returns what is wrong with the weights of a fusion, one for each of `count` runs or indexes, or none at all."""
    problems = []
    if weights and len(weights) != count:
        problems.append(f"--weights: {len(weights)} for {count} {of}; give one for each")
    if weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        problems.append("--weights: must be 0 or more, one of them above 0")
    return problems


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    """Measure one or more runs against judgements; the first run is the baseline of the others."""

    run: tuple[Path, ...]
    """Runs in TREC format."""
    qrels: Path
    """Judgements: TREC qrels, BEIR tsv, or a collection."""
    split: str = "test"
    """Split of a collection given as --qrels."""
    metrics: tuple[str, ...] = ("nDCG@10", "R@100", "RR@10")
    """Measures by their names in ir-measures."""
    permutations: int = 10_000
    """Resamples of the paired randomisation test."""
    seed: int = 42
    """Seed of the randomisation test."""
    output: Path | None = None
    """Also write the table and the per-query values here, as JSON."""

    def problems(self) -> list[str]:
        """See `JobConfig.problems`."""
        return [
            *super().problems(),
            *([] if self.run else ["--run: is required"]),
            *([] if self.metrics else ["--metrics: is required"]),
            *self._at_least(1, "permutations"),
            *self._at_least(0, "seed"),
        ]
