"""How the methods of ``scpo_ablation.py`` get where they end: rollouts over updates and over seconds.

    python benchmarks/scpo_curves.py

Means over seeds of each update's training rollouts. Seconds are updates times the median duration of a method's
updates in the runs of 15 updates, which followed one another: as all runs shared their machine and were paused, they
compare costs roughly and are no wall times. The critical share of
rollouts is the estimator's and known for SCPO only; that of the held-out answers, drawn as dots at the ends, is the
task's own and known for all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scpo_ablation import RESULTS, UPDATES, Experiment, read_rows

SHOWN = {
    "grpo": "tab:gray",
    "grpo-length-0.1-unscaled": "gold",
    "grpo-length-0.2-unscaled": "tab:orange",
    "grpo-length-0.4": "tab:red",
    "scpo-0.5": "tab:blue",
    "scpo-1": "tab:cyan",
}
"""Plain GRPO, the penalties that end best and the quickest of those that TRL scales, SCPO as shipped and twice it."""

PANELS = {"mean_tokens": "tokens per response", "accuracy": "accuracy", "critical_share": "critical share of tokens"}

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    """Draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, early = read_rows(Experiment().rows), read_rows(Experiment(updates=15).rows)
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(PANELS), sharey="col")
    for method, colour in SHOWN.items():
        own = [row for row in rows if row["method"] == method]
        second = seconds_per_update([row for row in early if row["method"] == method])
        print(f"{method}: {len(own)} seeds, {second:.2f} s an update in the median")
        for column, name in enumerate(PANELS):
            updates, values = curve(own, name)
            end = statistics.mean(row["after"][name] for row in own)
            for axes, scale in zip(grid[:, column], (1.0, second), strict=True):
                axes.plot([at * scale for at in updates], values, color=colour, linewidth=1.2, label=method)
                axes.plot([UPDATES * scale], [end], "o", color=colour, markersize=4)
    for column, title in enumerate(PANELS.values()):
        grid[0, column].set_title(title, fontsize=9)
        grid[0, column].set_xlabel("updates")
        grid[1, column].set_xlabel("seconds of training, on one core")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN), fontsize=7)
    figure.savefig(RESULTS / "scpo_curves.png", dpi=120)


def curve(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Mean over seeds by update, where rollouts were drawn (each batch serves ``num_iterations`` updates)."""
    by_update: dict[int, list[float]] = {}
    for row in rows:
        for point in row["curve"]:
            if point.get(name) is not None:
                by_update.setdefault(point["update"], []).append(point[name])
    return list(by_update), [statistics.mean(values) for values in by_update.values()]


def seconds_per_update(rows: Rows) -> float:
    """Median over seeds of the median of pairs: one update with sampling and one without."""
    medians = []
    for row in rows:
        seconds = [point["seconds"] for point in row["curve"] if "seconds" in point]
        pairs = [(first + second) / 2 for first, second in zip(seconds[::2], seconds[1::2], strict=False)]
        medians.append(statistics.median(pairs))
    return statistics.median(medians)


if __name__ == "__main__":
    main()
