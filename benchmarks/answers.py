"""Compare settings by what a model answers, as ``thinkkv eval`` does: resumable, rows and samples in ``results/``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import save

from thinkkv.sdk.cli.console import track
from thinkkv.sdk.evaluation.journal import Journal
from thinkkv.sdk.evaluation.rows import rows
from thinkkv.sdk.evaluation.runner import Evaluation
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.evaluation.tasks import task_named
from thinkkv.sdk.evaluation.tasks.task import Task

RESULTS = Path(__file__).parent / "results"


def parser(about: str | None, *, tasks: str, ratio: str) -> argparse.ArgumentParser:
    """Options that such comparisons share, with these defaults."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--dtype", default="bfloat16")
    found.add_argument("--tasks", default=tasks)
    found.add_argument("--ratio", default=ratio)
    found.add_argument("--context", type=int, default=2000)
    found.add_argument("--samples", type=int, default=25)
    return found


def ratios(options: argparse.Namespace) -> list[float]:
    """Of the command line."""
    return [float(ratio) for ratio in options.ratio.split(",")]


def task_of(name: str) -> Task:
    """The task of this name."""
    return task_named(name, lambda path: path.read_text(encoding="utf-8"))


def compare(model: Any, tokenizer: Any, settings: Sequence[Setting], options: argparse.Namespace, name: str) -> None:
    """Answer what ``results/<name>.jsonl`` does not hold yet, and write the means into ``results/<name>.json``."""
    evaluation = Evaluation(model, tokenizer, settings, profiles={})
    tasks = [task_of(task) for task in options.tasks.split(",")]
    cells = evaluation.cells(tasks, [options.context], ["in-window", "after"])
    journal = Journal(RESULTS / f"{name}.jsonl", evaluation.identity, evaluation.calibrations)
    evaluation.run(cells, options.samples, journal, track)
    save(RESULTS / f"{name}.json", {"rows": rows(journal, cells, settings, options.samples)})
