"""Compare settings by what a model answers, as ``thinkkv eval`` does: resumable, rows and samples in ``results/``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import save

from thinkkv.patches.errors import ProfileMismatchError
from thinkkv.sdk.calibration import calibrate
from thinkkv.sdk.cli.console import track
from thinkkv.sdk.evaluation.journal import Journal
from thinkkv.sdk.evaluation.rows import rows
from thinkkv.sdk.evaluation.runner import Evaluation
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.evaluation.tasks import task_named
from thinkkv.sdk.evaluation.tasks.task import Task
from thinkkv.sdk.hidden_facts import builtin_prompts
from thinkkv.sdk.profile import HeadProfile

RESULTS = Path(__file__).parent / "results"
RETRIEVAL = RESULTS / "eval_2000" / "retrieval-profile"
QUICK = Path("thinkkv-out", "quick")


def parser(about: str | None, *, tasks: str, ratio: str = "") -> argparse.ArgumentParser:
    """Options that such comparisons share, with these defaults."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--tasks", default=tasks)
    if ratio:
        found.add_argument("--ratio", default=ratio)
    found.add_argument("--context", type=int, default=2000)
    found.add_argument("--samples", type=int, default=25)
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    found.add_argument("--quick", action="store_true", help="a look: 600 tokens, one sample, one ratio; below a minute")
    found.add_argument("--profile", type=Path, default=RETRIEVAL, help="for retrieval; calibrated if of another model")
    return found


def quick(options: argparse.Namespace) -> argparse.Namespace:
    """The options of a look, where one is wanted."""
    if options.quick:
        options.tasks = options.tasks.partition(",")[0]
        if "ratio" in options:
            options.ratio = options.ratio.partition(",")[0]
        options.context, options.samples = 600, 1
        options.out = QUICK if options.out == RESULTS else options.out
    return options


def retrieval_scores(model: Any, tokenizer: Any, profile: Path) -> tuple[tuple[float, ...], ...]:
    """Of a profile where it is this model's, else calibrated, which takes minutes."""
    found = HeadProfile.load(profile)
    try:
        found.check(model)
    except ProfileMismatchError:
        found = calibrate(model, tokenizer, score="retrieval", progress=track("calibrating heads by retrieval"))
    return found.scores


def mean_distances(model: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[tuple[float, ...], ...]:
    """Distances from the semantic center over the built-in prompts; over one of them for a look."""
    prompts = builtin_prompts()[:1] if options.quick else None
    return calibrate(model, tokenizer, prompts, score="distance").scores


def ratios(options: argparse.Namespace) -> list[float]:
    """Of the command line."""
    return [float(ratio) for ratio in options.ratio.split(",")]


def task_of(name: str) -> Task:
    """The task of this name."""
    return task_named(name, lambda path: path.read_text(encoding="utf-8"))


def compare(model: Any, tokenizer: Any, settings: Sequence[Setting], options: argparse.Namespace, name: str) -> None:
    """Answer what ``<out>/<name>.jsonl`` does not hold yet, and write the means into ``<out>/<name>.json``."""
    options.out.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(model, tokenizer, settings, profiles={})
    tasks = [task_of(task) for task in options.tasks.split(",")]
    cells = evaluation.cells(tasks, [options.context], ["in-window", "after"])
    journal = Journal(options.out / f"{name}.jsonl", evaluation.identity, evaluation.calibrations)
    evaluation.run(cells, options.samples, journal, track)
    save(options.out / f"{name}.json", {"rows": rows(journal, cells, settings, options.samples)})
