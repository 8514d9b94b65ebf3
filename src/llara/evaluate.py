"""Measures runs against judgements through ir-measures, and says how sure a difference between two runs is."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llara import progress
from llara.config import EvaluateConfig, to_plain
from llara.data import rank_hits, read_qrels, read_run
from llara.data.collections import refuse_splits
from llara.errors import ConfigError, DataError, nearest
from llara.files import check_output, write_json_atomic
from llara.outputs import check_place
from llara.records import Hit, Qrel

Floats = NDArray[np.float64]
_CONFIDENCE = 0.95
_BLOCK = 1 << 20  # values drawn at once by a resampling, so that memory does not grow with the number of queries
_NAME = re.compile(r"([^\W\d]\w*)(?:@(\d+))?")


@dataclass(frozen=True)
class Comparison:
    """How one run differs from the first in one metric.

    `difference` is the mean over queries of run minus baseline, `low` and `high` bound it with 95 % confidence
    (percentile bootstrap over queries), `p_value` is that of a paired two-sided randomisation test.
    """

    run: str
    baseline: str
    metric: str
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    `values[run][metric][i]` belongs to `queries[i]`; `means[run][metric]` is its mean over all judged queries.
    `without_hits[run]` counts judged queries that the run has no hits for (they count as zero), `unjudged[run]` its
    queries without judgements (left out).
    """

    metrics: tuple[str, ...]
    runs: tuple[str, ...]
    queries: tuple[str, ...]
    means: dict[str, dict[str, float]]
    values: dict[str, dict[str, list[float]]]
    comparisons: tuple[Comparison, ...]
    without_hits: dict[str, int]
    unjudged: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Returns the whole as JSON values, per-query values included."""
        return {
            "metrics": list(self.metrics),
            "runs": list(self.runs),
            "queries": list(self.queries),
            "means": self.means,
            "values": self.values,
            "comparisons": [vars(comparison) for comparison in self.comparisons],
            "without_hits": self.without_hits,
            "unjudged": self.unjudged,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Evaluation":
        """Reads what `to_json` gave, for example from the file that `--output` names; other keys are left alone."""
        return cls(
            metrics=tuple(values["metrics"]),
            runs=tuple(values["runs"]),
            queries=tuple(values["queries"]),
            means=values["means"],
            values=values["values"],
            comparisons=tuple(Comparison(**entry) for entry in values["comparisons"]),
            without_hits=values["without_hits"],
            unjudged=values["unjudged"],
        )

    def table(self) -> list[list[str]]:
        """Returns a header and one row per run; from the second run on, cells name the difference to the first."""
        compared = {(each.run, each.metric): each for each in self.comparisons}

        def cell(run: str, metric: str) -> str:
            mean, other = f"{self.means[run][metric]:.4f}", compared.get((run, metric))
            return f"{mean} ({other.difference:+.4f}, {format_p(other.p_value)})" if other else mean

        return [["run", *self.metrics], *([run, *(cell(run, metric) for metric in self.metrics)] for run in self.runs)]

    def comparison_table(self) -> list[list[str]]:
        """Returns a header and one row per comparison, with its confidence interval; only the header for one run."""
        header = ["run", "metric", "difference", "95 % interval", "p"]
        return [
            header,
            *(
                [each.run, each.metric, f"{each.difference:+.4f}", f"{each.low:+.4f} to {each.high:+.4f}",
                 format_p(each.p_value).removeprefix("p").removeprefix("=")]
                for each in self.comparisons
            ),
        ]  # fmt: skip

    def to_text(self) -> str:
        """Returns the tables as aligned markdown, without a newline at the end."""
        text = f"{markdown_table(self.table())}\n\n{len(self.queries)} judged queries"
        if not self.comparisons:
            return text
        text += f"; differences to {self.runs[0]}, p by a paired two-sided randomisation test\n\n"
        return text + markdown_table(self.comparison_table())


def format_p(p_value: float) -> str:
    """Returns `p=0.042`, or `p<0.001` for anything smaller."""
    return "p<0.001" if p_value < 0.001 else f"p={p_value:.3f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows, the first being the header, as an aligned markdown table: the first column left, others right."""
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measures `config.run` against `config.qrels`; writes the result to `config.output` where that is given.

    Raises ConfigError for an unknown metric or an output that is also an input, DataError for files that do not fit
    their format or share no query, and StorageError for an output that cannot be written.
    """
    parse_metrics(config.metrics)  # before files are read, which may take long
    if config.output is not None:
        check_output(config.output, [config.qrels, *config.run])
        check_place(config.output)
    refuse_splits("--split", config.split, EvaluateConfig.split, [config.qrels])
    qrels = read_qrels(config.qrels, config.split)
    if not qrels:
        raise DataError(config.qrels, None, "holds no judgements")
    runs = {name: read_run(path) for name, path in zip(run_names(config.run), config.run, strict=True)}
    judged = {qrel.query_id for qrel in qrels}
    for (name, run), path in zip(runs.items(), config.run, strict=True):
        _check_overlap(name, run, judged, path, config.qrels)
    result = compare(runs, qrels, config.metrics, permutations=config.permutations, seed=config.seed)
    if config.output is not None:
        write_json_atomic(config.output, {**result.to_json(), "config": to_plain(config)})
    return result


def compare(
    runs: Mapping[str, Mapping[str, Sequence[Hit]]],
    qrels: Iterable[Qrel],
    metrics: Sequence[str],
    *,
    permutations: int = 10_000,
    seed: int = 42,
) -> Evaluation:
    """Measures named runs (query id -> hits) against judgements; the first run is the baseline of the others.

    Hits are ranked by score descending, ties by document id descending, whatever rank they carry. A judged query
    without hits counts as zero, as in `trec_eval -c`; queries without judgements are left out.
    """
    judged: dict[str, dict[str, int]] = {}
    for qrel in qrels:
        judged.setdefault(qrel.query_id, {})[qrel.document_id] = qrel.relevance
    queries = tuple(judged)
    values = {name: _per_query(run, judged, metrics) for name, run in runs.items()}
    baseline, *others = values
    comparisons = (
        _compare_pair(name, baseline, metric, values[name][metric], values[baseline][metric], permutations, seed)
        for name in others
        for metric in metrics
    )
    return Evaluation(
        metrics=tuple(metrics),
        runs=tuple(values),
        queries=queries,
        means={name: {metric: float(each.mean()) for metric, each in run.items()} for name, run in values.items()},
        values={name: {metric: each.tolist() for metric, each in run.items()} for name, run in values.items()},
        comparisons=tuple(comparisons),
        without_hits={name: sum(not run.get(query) for query in queries) for name, run in runs.items()},
        unjudged={name: sum(query not in judged for query in run) for name, run in runs.items()},
    )


def parse_metrics(names: Sequence[str]) -> list[Any]:
    """Returns the ir-measures measure of each name; ConfigError lists every name that is none."""
    measures: list[Any] = []
    problems: list[str] = []
    for name in names:
        try:
            measures.append(_parse_metric(name))
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return measures


def _parse_metric(name: str) -> Any:
    import ir_measures

    known: dict[str, Any] = ir_measures.measures.registry
    base, _, cutoff = name.partition("@")
    plain = _NAME.fullmatch(name)
    if base.partition("(")[0] not in known:
        by_lower = {each.lower(): each for each in sorted(known)}  # of two spellings the last one: nDCG, not NDCG
        match = nearest(base.lower(), by_lower)
        for lower, right in by_lower.items():
            match = match.replace(f"'{lower}'", f"'{right}@{cutoff}'" if cutoff else f"'{right}'")
        raise ConfigError(f"--metrics: ir-measures has no {name!r}{match}")
    unfit = f"--metrics: {name!r} does not fit ir-measures; does it lack a cutoff, as in {base}@10"
    try:
        # The plain form is taken apart here: the library's parser uses parts of `ast` that Python 3.14 has removed.
        measure = _plain_metric(known[plain[1]], plain[2]) if plain else ir_measures.parse_measure(name)
        pipeline: Any = ir_measures.DefaultPipeline
        supported = pipeline.supports(measure)
    except AssertionError as error:  # the library's way to say that a parameter lacks or has a wrong type
        raise ConfigError(f"{unfit}?") from error
    except (ValueError, NameError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{unfit}? ({error})") from error
    if not supported:
        raise ConfigError(f"{unfit}, or need a package that is not installed?")
    return measure


def _plain_metric(measure: Any, cutoff: str | None) -> Any:
    return measure if cutoff is None else measure @ int(cutoff)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Returns one short name per run file: the file's stem, with as many folders as it takes to be unique.

    Raises ConfigError when a file is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("--run: the same file is given twice")
    parts = [(*path.resolve().parts[1:-1], path.name.removesuffix(path.suffix)) for path in paths]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _check_overlap(name: str, run: Mapping[str, Sequence[Hit]], judged: set[str], path: Path, qrels: Path) -> None:
    unjudged = [query for query in run if query not in judged]
    if run and len(unjudged) == len(run):
        example = f"(for example {unjudged[0]!r})"
        raise DataError(path, None, f"none of its {len(run)} queries {example} has judgements in {qrels}")
    if unjudged:
        few = ", ".join(unjudged[:3]) + (", ..." if len(unjudged) > 3 else "")
        progress.note(f"{name}: {len(unjudged)} queries have no judgements and are left out: {few}")
    missing = sorted(query for query in judged if not run.get(query))
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        progress.note(f"{name}: {len(missing)} judged queries have no hits and count as zero: {few}")


def _ranking(query: str, hits: Iterable[Hit]) -> list[Hit]:
    return rank_hits(query, ((hit.document_id, hit.score) for hit in hits))


def _per_query(
    run: Mapping[str, Sequence[Hit]], judged: Mapping[str, Mapping[str, int]], metrics: Sequence[str]
) -> dict[str, Floats]:
    import ir_measures

    measures = parse_metrics(metrics)
    # Scores are replaced by ranks: the providers behind ir-measures break ties in opposite ways (RR@k by document id
    # ascending, the others descending) and compare scores in different precision. An empty ranking is left out, for
    # ir-measures fills in a zero for every judged query that a run lacks.
    scores = {
        query: {hit.document_id: -float(rank) for rank, hit in enumerate(_ranking(query, hits))}
        for query, hits in run.items()
        if query in judged and hits
    }
    place = {query: row for row, query in enumerate(judged)}
    columns = {measure: np.full(len(place), np.nan) for measure in measures}
    for result in ir_measures.iter_calc(measures, judged, scores):
        columns[result.measure][place[result.query_id]] = result.value
    assert not any(np.isnan(column).any() for column in columns.values()), "ir-measures left a judged query out"
    return {metric: columns[measure] for metric, measure in zip(metrics, measures, strict=True)}


def _compare_pair(
    run: str, baseline: str, metric: str, ours: Floats, theirs: Floats, permutations: int, seed: int
) -> Comparison:
    low, high = bootstrap_interval(ours - theirs, permutations, seed)
    return Comparison(
        run=run,
        baseline=baseline,
        metric=metric,
        difference=float((ours - theirs).mean()),
        low=low,
        high=high,
        p_value=randomisation_test(ours, theirs, permutations, seed),
    )


def randomisation_test(ours: Floats, theirs: Floats, permutations: int, seed: int) -> float:
    """Returns the p-value of a paired two-sided randomisation test on the mean difference.

    `ours` and `theirs` are float64 [queries]. Exact where 2^queries <= `permutations`, else sampled with the usual
    correction (hits + 1) / (permutations + 1). Source: Smucker, Allan & Carterette, CIKM 2007, section 3.
    """
    if len(ours) < 2:  # a single difference and its reverse are equally far from zero; scipy refuses to say so
        return 1.0
    from scipy.stats import permutation_test

    def mean_difference(a: Floats, b: Floats, axis: int) -> Floats:
        return np.asarray(np.mean(a - b, axis=axis))

    result = permutation_test(
        (ours, theirs),
        mean_difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        batch=max(1, _BLOCK // len(ours)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def bootstrap_interval(differences: Floats, resamples: int, seed: int) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the mean of `differences`, float64 [queries]."""
    rng, count = np.random.default_rng(seed), len(differences)
    step = max(1, _BLOCK // count)
    means = [
        differences[rng.integers(0, count, (min(step, resamples - start), count))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
