"""SCPO beside its baselines, without each of its parts, and with other importances, on the tiny recipe's task.

    python benchmarks/scpo_ablation.py                     # all of it: hours; every finished row is kept
    python benchmarks/scpo_ablation.py --seeds 0 --methods grpo,scpo-0.5
    python benchmarks/scpo_ablation.py --updates 15 --methods front   # stopped early: rows of their own
    python benchmarks/scpo_ablation.py --chains long --methods front
    python benchmarks/scpo_ablation.py --only-summary

Long chains have 4 to 12 operations instead of 2 to 6. Every method starts from the same weights of its seed (the tiny
recipe up to stage 1) and runs the same number of updates in the same trainer. One row per method and seed goes into
``results/scpo_ablation.jsonl`` as soon as it is there; the same command goes on where it stopped. The summary is
``results/scpo_ablation.md`` and ``results/scpo_ablation.png``, those of long chains and of another number of updates
say so in their names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import describe
from intervals import interval

RESULTS = Path(__file__).parent / "results"
WORK = Path("thinkkv-out/ablation")
UPDATES = 60
EVAL_ROWS = 400

SCPO_STRENGTHS = (0.25, 0.5, 1.0, 2.0)
PENALTIES = (0.1, 0.2, 0.4, 0.8)
UNSCALED_PENALTIES = (0.05, 0.1, 0.2, 0.4)
"""Without division by the group's standard deviation, which makes any penalty one of unit size where all are right."""

METHODS: Mapping[str, Mapping[str, Any] | None] = {
    "sft": None,
    "grpo": {"kind": "grpo"},
    **{f"grpo-length-{alpha:g}": {"kind": "grpo", "length_penalty": alpha} for alpha in PENALTIES},
    **{
        f"grpo-length-{alpha:g}-unscaled": {"kind": "grpo", "length_penalty": alpha, "args": {"scale_rewards": "none"}}
        for alpha in UNSCALED_PENALTIES
    },
    **{f"scpo-{strength:g}": {"kind": "scpo", "strength": strength} for strength in SCPO_STRENGTHS},
    **{
        f"scpo-{strength:g}-unscaled": {
            "kind": "scpo",
            "strength": strength,
            "whitening": "none",
            "args": {"scale_rewards": "none"},
        }
        for strength in SCPO_STRENGTHS
    },
    "scpo-without-importance": {"kind": "scpo", "importance": "uniform"},
    "scpo-without-step-reward": {"kind": "scpo", "strength": 0.0},
    "scpo-without-s-gae": {"kind": "scpo", "step_level": False},
    "scpo-without-adaptive-clip": {"kind": "scpo", "adaptive_clip": False},
    "scpo-random-importance": {"kind": "scpo", "importance": "random"},
    "scpo-oracle-importance": {"kind": "scpo", "importance": "oracle"},
}
"""The last stage of each method; ``sft`` has none. Uniform importance is control and switched-off part in one."""

LENGTH_PENALTIES = tuple(name for name in METHODS if name.startswith("grpo-length-"))
SCPO_FRONT = tuple(f"scpo-{strength:g}{scale}" for scale in ("", "-unscaled") for strength in SCPO_STRENGTHS)
"""Divided by the group's standard deviations, outcome and steps, and with both in their own units."""

FRONT = ("sft", "grpo", *LENGTH_PENALTIES, *SCPO_FRONT)
"""What the accuracy-length front is drawn from: ``--methods front``."""


class Quiet:
    """A reporter that says nothing."""

    def stage(self, *_: Any) -> None: ...

    def step(self, *_: Any) -> None: ...

    def evaluated(self, *_: Any) -> None: ...

    def note(self, *_: Any) -> None: ...


@dataclass(frozen=True)
class Experiment:
    """What all methods share.

    Args:
        updates: of the last stage.
        long_chains: whether problems have 4 to 12 operations instead of 2 to 6.
    """

    updates: int = UPDATES
    long_chains: bool = False

    @property
    def name(self) -> str:
        """In file names: what differs from the full comparison."""
        chains = "_long_chains" if self.long_chains else ""
        return chains + ("" if self.updates == UPDATES else f"_{self.updates}_updates")

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.updates} updates" + (", long chains" if self.long_chains else "")

    @property
    def rows(self) -> Path:
        """Where its rows are kept."""
        return RESULTS / f"scpo_ablation{self.name}.jsonl"

    def recipe(self, seed: int, stage: Mapping[str, Any] | None) -> dict[str, Any]:
        """The tiny recipe with another last stage, or without one."""
        import yaml

        from thinkkv.recipes.config import find

        recipe: dict[str, Any] = yaml.safe_load(find("tiny.yaml").read_text(encoding="utf-8"))
        arguments = recipe["stages"].pop()["args"]
        if stage is not None:
            trained = {**arguments, **stage.get("args", {}), "max_steps": self.updates}
            recipe["stages"].append({**stage, "args": trained})
        recipe["seed"], recipe["data"]["eval_rows"] = seed, EVAL_ROWS
        if self.long_chains:
            recipe["data"]["options"] = {"easy": [4, 6], "hard": [8, 12]}
            recipe["stages"][0]["args"]["max_steps"] = 1500
            recipe["rollout"]["max_new_tokens"] = 320
        return recipe


def main() -> None:
    """Run what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas; front stands for several")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--chains", choices=("short", "long"), default="short")
    parser.add_argument("--only-summary", action="store_true")
    options = parser.parse_args()
    methods = [name for part in options.methods.split(",") for name in (FRONT if part == "front" else [part])]
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))} - choose among {', '.join(METHODS)} and front")
    experiment = Experiment(options.updates, options.chains == "long")
    if not options.only_summary:
        here = describe()  # now: the code that runs is the one that is loaded here, whatever is committed meanwhile
        for seed in map(int, options.seeds.split(",")):
            for method in methods:
                run_missing(experiment, method, seed, here)
    summarise(read_rows(experiment.rows), experiment.rows)


def run_missing(experiment: Experiment, method: str, seed: int, here: Mapping[str, Any]) -> None:
    """One row, unless it is there."""
    if any(row["method"] == method and row["seed"] == seed for row in read_rows(experiment.rows)):
        return
    row = run_method(experiment, method, seed) | here
    with experiment.rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    after = row["after"]
    print(
        f"seed {seed} {method}, {row['updates']} updates: accuracy {after['accuracy']:.3f}, "
        f"{after['mean_tokens']:.1f} tokens, critical share {after['critical_share']:.2f}, {row['seconds']:.0f} s",
        flush=True,
    )


def run_method(experiment: Experiment, method: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one method from its seed's start."""
    seeds = WORK / ("long-chains" if experiment.long_chains else "") / f"seed-{seed}"
    start, folder = seeds / "start", seeds / f"{method}{experiment.name}"
    verbose, base = run_recipe(start, experiment.recipe(seed, None))["stages"][:3:2]
    began, stage = time.monotonic(), METHODS[method]
    if stage is not None and not folder.exists():
        # The stages before the last are the start's: the runner finds them finished.
        copy = folder.with_name(f".{folder.name}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(start, copy)
        copy.rename(folder)
    after = base if stage is None else run_recipe(folder, experiment.recipe(seed, stage))["stages"][-1]
    return {
        "method": method,
        "seed": seed,
        "verbose": values(verbose, "after"),
        "start": values(base, "after"),
        "after": values(after, "after"),
        "updates": 0 if stage is None else experiment.updates,
        "seconds": round(time.monotonic() - began, 1),
        "curve": [] if stage is None else curve(folder),
    }


def run_recipe(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Run a recipe in a folder, or go on there."""
    import yaml

    from thinkkv.recipes.config import load
    from thinkkv.recipes.runner import run

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return run(load(path), folder, Quiet())


def values(stage: Mapping[str, Any], when: str) -> dict[str, float]:
    """An evaluation in a row."""
    keys = ("accuracy", "ci95", "mean_tokens", "critical_share", "estimated_critical_share", "importance_auc")
    return {key: stage[key][when] for key in keys}


def curve(folder: Path) -> list[dict[str, float]]:
    """Training rollouts over the last stage, by update, with the seconds since its first one."""
    from thinkkv.recipes.metrics import MetricsLog

    names = {
        "accuracy": "accuracy",
        "completions/mean_length": "mean_tokens",
        "scpo/critical_share": "critical_share",
        "scpo/importance_share": "importance_share",
        "step_time": "seconds",
    }
    rows = [row for row in MetricsLog(folder / "metrics.jsonl").rows() if row["stage"] == 3]
    return [{"update": row["step"], **{ours: row[name] for name, ours in names.items() if name in row}} for row in rows]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def summarise(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Beside the rows, a table with 95 % intervals over seeds, and the accuracy-length plane."""
    table = ["| method | seeds | accuracy | tokens | tokens saved | critical share |", "|---|---|---|---|---|---|"]
    points = []
    for method in [name for name in METHODS if any(row["method"] == name for row in rows)]:
        own = [row for row in rows if row["method"] == method]
        accuracy, tokens, share = (interval([row["after"][key] for row in own]) for key in METRICS)
        saved = interval([100 * (1 - row["after"]["mean_tokens"] / row["verbose"]["mean_tokens"]) for row in own])
        points.append((method, accuracy, tokens))
        cells = (shown(accuracy, 3), shown(tokens, 1), shown(saved, 0) + " %", shown(share, 2))
        table.append(f"| {method} | {len(own)} | {' | '.join(cells)} |")
    path.with_suffix(".md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))
    draw(points, path.with_suffix(".png"))


METRICS = ("accuracy", "mean_tokens", "critical_share")


def shown(value: tuple[float, float], digits: int) -> str:
    """Mean and half width."""
    mean, half = value
    return f"{mean:.{digits}f}" if half != half else f"{mean:.{digits}f} ± {half:.{digits}f}"


def colour(method: str) -> str:
    """Of a family of methods in every picture."""
    return "tab:orange" if "length" in method else "tab:blue" if method.startswith("scpo") else "tab:gray"


def draw(points: Sequence[tuple[str, tuple[float, float], tuple[float, float]]], path: Path) -> None:
    """Accuracy over tokens; up and left is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, (accuracy, up), (tokens, across) in points:
        look: dict[str, Any] = {"fmt": "o", "color": colour(method), "linewidth": 0.8, "markersize": 4}
        axes.errorbar(tokens, accuracy, xerr=across, yerr=up, **look)
        axes.annotate(method, (tokens, accuracy), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel("tokens per response")
    axes.set_ylabel("accuracy")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
