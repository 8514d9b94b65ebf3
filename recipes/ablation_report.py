"""Tables and plot of the cells that recipes/ablation.py has finished; its command `report` calls this.

Per collection and arm: nDCG@10, mean over seeds; the difference to each baseline with a 95 % interval (bootstrap over
queries and seeds together) and the p-value of a paired two-sided randomisation test over queries, each query's value
being its mean over the seeds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llara.evaluate import format_p, markdown_table, randomisation_test

if TYPE_CHECKING:
    from ablation import Plan

METRIC = "nDCG@10"
RESAMPLES = 10_000
TITLES = {"scifact": "SciFact", "medquad": "MedQuAD by focus", "docs": "Documentation strings"}
Values = NDArray[np.float64]


def write_report(plan: "Plan") -> None:
    """Writes `<results>.md` and, where matplotlib is installed, `<results>.png` beside the folder of cells."""
    cells = read_cells(plan)
    if not cells:
        raise SystemExit(f"no cell is finished in {plan.results}; begin with: python recipes/ablation.py run")
    path = plan.results.with_suffix(".md")
    path.write_text(report(plan, cells), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    draw(plan, cells, plan.results.with_suffix(".png"))


def read_cells(plan: "Plan") -> dict[str, list[dict[str, Any]]]:
    """Returns the finished cells by arm, in the order of the configuration; all must have seen the same data."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in plan.arms:
        paths = [plan.result(arm, seed) for seed in plan.seeds]
        cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        if cells:
            found[arm] = cells
    data = {json.dumps(cell["data"], sort_keys=True) for cells in found.values() for cell in cells}
    if len(data) > 1:
        raise SystemExit(f"the cells in {plan.results} were measured on different data; delete those of the older one")
    return found


def values(cells: Sequence[dict[str, Any]], collection: str) -> Values:
    """Returns float64 [seeds, queries]."""
    return np.array([cell["collections"][collection][METRIC] for cell in cells], dtype=np.float64)


def interval(ours: Values, theirs: Values, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of the mean difference, both sides' seeds and the queries drawn again each time."""
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        queries = rng.integers(0, ours.shape[1], ours.shape[1])
        left = ours[rng.integers(0, len(ours), len(ours))].mean(axis=0)[queries]
        right = theirs[rng.integers(0, len(theirs), len(theirs))].mean(axis=0)[queries]
        means[number] = (left - right).mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difference(ours: Values, theirs: Values) -> str:
    low, high = interval(ours, theirs)
    mean_ours, mean_theirs = ours.mean(axis=0), theirs.mean(axis=0)
    p_value = randomisation_test(mean_ours, mean_theirs, RESAMPLES, 42)
    return f"{(mean_ours - mean_theirs).mean():+.4f} [{low:+.4f}, {high:+.4f}] {format_p(p_value)}"


def report(plan: "Plan", cells: dict[str, list[dict[str, Any]]]) -> str:
    every = [cell for group in cells.values() for cell in group]
    dates = sorted({cell["date"] for cell in every})
    commits = sorted({str(cell["commit"]) for cell in every})
    command = f"python recipes/ablation.py run --config recipes/{plan.name.replace('-', '_')}.toml"
    machines = ", ".join(sorted({cell["hardware"] for cell in every}))
    parts = [
        f"# Ablation of adaptation ({plan.name}), {plan.split} splits",
        f"`{command}`, {dates[0]} to {dates[-1]}, commits {', '.join(commits)}, {machines}, one thread per cell. "
        f"Model: mini. {METRIC}, mean over seeds; differences with a 95 % interval (bootstrap over queries and "
        "seeds) and the p-value of a paired two-sided randomisation test over queries.",
    ]
    for collection, title in TITLES.items():
        baselines = [name for name in (*plan.baselines, *plan.compared) if name in cells]
        rows = [["arm", "seeds", METRIC, "R@100", *(f"difference to {name}" for name in baselines)]]
        for arm, group in cells.items():
            found = values(group, collection)
            recall = np.mean([cell["collections"][collection]["means"]["R@100"] for cell in group])
            others = ["" if arm == name else difference(found, values(cells[name], collection)) for name in baselines]
            rows.append([arm, str(len(group)), f"{found.mean():.4f}", f"{recall:.4f}", *others])
        queries = values(every[:1], collection).shape[1]
        parts += [f"## {title}: {queries:,} queries", markdown_table(rows)]
    rows = [["arm", "seed", "adapt (s)", "finetune (s)", "commit", "date"]]
    for cell in every:
        taken = (f"{cell['seconds'][stage]:.0f}" if stage in cell["seconds"] else "" for stage in ("adapt", "finetune"))
        rows.append([cell["arm"], str(cell["seed"]), *taken, str(cell["commit"]), cell["date"]])
    return "\n\n".join([*parts, "## Cells", markdown_table(rows)]) + "\n"


def draw(plan: "Plan", cells: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws every arm's mean with its seeds, one panel per collection."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TITLES), figsize=(4 * len(TITLES), 0.4 * len(cells) + 1.6), sharey=True)
    places = np.arange(len(cells))[::-1]
    for axis, (collection, title) in zip(axes, TITLES.items(), strict=True):
        for place, (arm, group) in zip(places, cells.items(), strict=True):
            seeds = values(group, collection).mean(axis=1)
            colour = "tab:gray" if arm in plan.baselines else "tab:blue"
            axis.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.4, markersize=5)
            axis.plot([seeds.mean()], [place], "|", color=colour, markersize=16, markeredgewidth=2)
        for name in plan.baselines:
            if name in cells:
                axis.axvline(values(cells[name], collection).mean(), color="tab:gray", linewidth=0.8, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel(METRIC)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, list(cells))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
