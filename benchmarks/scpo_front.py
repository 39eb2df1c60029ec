"""Does SCPO's accuracy-length front lie above the length penalties'? From the rows of ``scpo_ablation.py``.

    python benchmarks/scpo_front.py

Two numbers per seed compare an SCPO model with the front of the same seed's eight penalties and its start, where two
models may be mixed (each question goes to one of them by a coin, which joins two points of the plane by a line):

- *accuracy gained* over the front at SCPO's tokens (over its shortest model, where none is so short);
- *tokens saved* against the front at SCPO's accuracy less ``TOLERANCE``, which is more than the standard error of the
  difference of two such accuracies (against its most accurate model, where none is so accurate).

The front is the best of eight on the very answers that it is judged by, seed by seed: whatever luck there is in that
is the penalties'. SCPO lies *above* where the interval over seeds of one number excludes zero in its favour and the
mean of the other is not against it; the intervals are 95 % for both numbers at once. This rule was written down
before there was any row of 15 updates. Paired differences from each penalty stand beside it, with a 95 % interval of
their own and one that holds for all eight at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from environment import save
from intervals import interval
from scpo_ablation import FRONT, LENGTH_PENALTIES, RESULTS, SCPO_FRONT, Experiment, colour, read_rows

TOLERANCE = 0.02
EXPERIMENTS = (Experiment(updates=15), Experiment(), Experiment(long_chains=True))
SHIPPED = "scpo-0.5"

Point = tuple[float, float]
"""Mean tokens and accuracy of a model."""

Points = Mapping[str, Mapping[int, Point]]
"""By method and seed."""


def main() -> None:
    """Compare, print and draw."""
    models = {experiment.title: points(experiment.rows) for experiment in EXPERIMENTS}
    found = {title: compared(those) for title, those in models.items()}
    save(RESULTS / "scpo_front.json", {"tolerance": TOLERANCE, "experiments": found})
    text = "\n".join(line for title in found for line in shown(title, found[title]))
    (RESULTS / "scpo_front.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(models, RESULTS / "scpo_front.png")


def points(path: Path) -> Points:
    """The front's models in a file of rows."""
    found: dict[str, dict[int, Point]] = {method: {} for method in FRONT}
    for row in read_rows(path):
        if row["method"] in found:
            found[row["method"]][row["seed"]] = (row["after"]["mean_tokens"], row["after"]["accuracy"])
    return found


def compared(models: Points) -> dict[str, Any]:
    """Every SCPO that was run against the front, and the shipped one against each penalty."""
    return {
        "front": {method: against_front(models, method) for method in SCPO_FRONT if models[method]},
        "pairs": {penalty: against_one(models, SHIPPED, penalty) for penalty in LENGTH_PENALTIES},
    }


def against_front(models: Points, method: str) -> dict[str, Any]:
    """The two numbers of the docstring, over the seeds that have every model."""
    rivals = ("sft", *LENGTH_PENALTIES)
    seeds = sorted(set.intersection(*(set(models[name]) for name in (method, *rivals))))
    gained, saved = [], []
    for seed in seeds:
        (tokens, accuracy), front = models[method][seed], [models[name][seed] for name in rivals]
        gained.append(accuracy - best_accuracy(front, tokens))
        saved.append(fewest_tokens(front, accuracy - TOLERANCE) - tokens)
    accuracy_gained, tokens_saved = interval(gained, comparisons=2), interval(saved, comparisons=2)
    return {
        "seeds": seeds,
        "accuracy_gained": accuracy_gained,
        "tokens_saved": tokens_saved,
        "above": (clear(accuracy_gained) and tokens_saved[0] >= 0) or (clear(tokens_saved) and accuracy_gained[0] >= 0),
    }


def clear(value: tuple[float, float]) -> bool:
    """Whether an interval lies above zero."""
    return value[0] > value[1]


def best_accuracy(front: Sequence[Point], tokens: float) -> float:
    """Highest accuracy of a mixture of models with at most so many tokens."""
    short = [model for model in front if model[0] <= tokens]
    if not short:
        return min(front)[1]
    mixed = [between(tokens, low, high) for low in short for high in front if high[0] > tokens]
    return max([accuracy for _, accuracy in short] + mixed)


def fewest_tokens(front: Sequence[Point], accuracy: float) -> float:
    """Fewest tokens of a mixture of models that is at least so accurate."""
    turned = [(-right, -tokens) for tokens, right in front]  # fewest tokens at an accuracy is the same question turned
    return -best_accuracy(turned, -accuracy)


def between(x: float, low: Point, high: Point) -> float:
    """Height at x of the line through two points."""
    return low[1] + (high[1] - low[1]) * (x - low[0]) / (high[0] - low[0])


def against_one(models: Points, method: str, rival: str) -> dict[str, Any]:
    """Paired differences over seeds, method less rival."""
    seeds = sorted(set(models[method]) & set(models[rival]))
    pairs = [(models[method][seed], models[rival][seed]) for seed in seeds]
    found: dict[str, Any] = {"seeds": seeds}
    for at, name in enumerate(("tokens", "accuracy")):
        differences = [own[at] - other[at] for own, other in pairs]
        mean, own_half = interval(differences)
        _, joint_half = interval(differences, comparisons=len(LENGTH_PENALTIES))
        found[name] = {"mean": mean, "half": own_half, "half_of_eight": joint_half}
    return found


def shown(title: str, found: Mapping[str, Any]) -> list[str]:
    """As Markdown tables."""
    lines = [
        f"## {title}",
        "",
        "| method | seeds | accuracy over the penalties' front | tokens under it | above |",
        "|---|---|---|---|---|",
    ]
    for method, row in found["front"].items():
        (accuracy, wide), (tokens, far) = row["accuracy_gained"], row["tokens_saved"]
        values = f"{accuracy:+.3f} ± {wide:.3f} | {tokens:+.1f} ± {far:.1f} | {'yes' if row['above'] else 'no'}"
        lines.append(f"| {method} | {len(row['seeds'])} | {values} |")
    lines += [
        "",
        f"| {SHIPPED} less | seeds | tokens | of eight | accuracy | of eight |",
        "|---|---|---|---|---|---|",
    ]
    for penalty, row in found["pairs"].items():
        cells = [difference(row[name], digits) for name, digits in (("tokens", 1), ("accuracy", 3))]
        lines.append(f"| {penalty} | {len(row['seeds'])} | {' | '.join(cells)} |")
    return [*lines, ""]


def difference(found: Mapping[str, float], digits: int) -> str:
    """Mean with its own half width, and the half width for all eight."""
    half, joint = (f"{found[name]:.{digits}f}" for name in ("half", "half_of_eight"))
    return f"{found['mean']:+.{digits}f} ± {half} | ± {joint}"


def draw(found: Mapping[str, Points], path: Path) -> None:
    """Means over seeds and their intervals, a panel per experiment; up and left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(found), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, models) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for method, seeds in models.items():
            if not seeds:
                continue
            (tokens, across), (accuracy, up) = (interval(values) for values in zip(*seeds.values(), strict=True))
            look: dict[str, Any] = {"fmt": "o", "color": colour(method), "linewidth": 0.6, "markersize": 4}
            axes.errorbar(tokens, accuracy, xerr=across, yerr=up, **look)
            axes.annotate(method, (tokens, accuracy), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tokens per response")
    figure.axes[0].set_ylabel("accuracy")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
