"""``thinkkv eval``: what is left of a model's answers when its cache is compressed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from thinkkv.sdk.cli.compared import Compared, compared_options, numbers, settings_table, words
from thinkkv.sdk.cli.console import console, print_json, progress, track
from thinkkv.sdk.cli.options import dtype_option, json_option, read_text

if TYPE_CHECKING:
    from thinkkv.sdk.evaluation.runner import Cell, Evaluation

TASKS = "niah-single,niah-multikey,niah-multivalue,variable-tracking,word-count,passkey,haystack-reasoning,perplexity"
QUICK = {"tasks": "niah-single,passkey,perplexity", "contexts": "600", "samples": 2, "policies": "full,task-kv,snapkv"}
QUESTIONS: Mapping[str, Sequence[Literal["in-window", "after"]]] = {
    "both": ("in-window", "after"),
    "in-window": ("in-window",),
    "after": ("after",),
}


@click.command(
    name="eval",
    epilog="""\b
Examples:
  thinkkv eval --model smollm2-135m --quick
  thinkkv eval --model smollm2-135m --tasks niah-single,perplexity --policies full,task-kv,snapkv --ratio 0.4,0.25
  thinkkv eval --tasks data:mine.jsonl,perplexity:book.txt,reasoning:chain_sum    (model of the newest `thinkkv patch`)
  thinkkv eval --model ./my-model --policies full,task-kv,task-kv+nearest=none+recent=128 --question after""",
)
@compared_options
@click.option(
    "--tasks",
    metavar="A,B",
    help="Generated tasks, perplexity[:FILE], reasoning[:GENERATOR], data:FILE.  [default: all but reasoning]",
)
@click.option("--samples", type=click.IntRange(min=1), help="Per task, context and way of asking.  [default: 25]")
@click.option(
    "--question",
    type=click.Choice(tuple(QUESTIONS)),
    default="both",
    show_default=True,
    help="Whether the question is compressed with the context (in its observation window), or comes after.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the samples.")
@click.option("--batch-tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Prompts at once.")
@click.option("--quick", is_flag=True, help="A look: three tasks, 600 tokens, 2 samples; below a minute.")
@dtype_option
@json_option
def evaluate(
    model: str | None,
    profile: tuple[Path, ...],
    policies: str | None,
    ratio: str,
    contexts: str | None,
    out: Path | None,
    tasks: str | None,
    samples: int | None,
    question: str,
    seed: int,
    batch_tokens: int,
    quick: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Measure what cache policies leave of a model's answers.

    Accuracy and perplexity against the bytes held; every policy answers the same samples.
    A killed run goes on where it stopped when the same command is given again.
    """
    start = time.monotonic()
    defaults: Mapping[str, Any] = QUICK if quick else {}
    sizes = numbers(contexts or defaults.get("contexts", "2000"), "--contexts", int)
    ratios = numbers(ratio, "--ratio", float)
    count = samples or defaults.get("samples", 25)
    chosen = Compared.of(model, profile, policies or defaults.get("policies"))
    from thinkkv.sdk.evaluation.setting import settings
    from thinkkv.sdk.evaluation.tasks import NAMES, is_known, task_named

    compared = settings(chosen.policies, ratios)
    named = words(tasks or defaults.get("tasks", TASKS), "--tasks")
    if unknown := [name for name in named if not is_known(name)]:
        raise click.UsageError(f"no task {unknown[0]!r} - choose among {', '.join(NAMES)}")
    asked = [task_named(name, read_text) for name in named]
    folder = chosen.folder("eval", out)
    network, tokenizer = chosen.load(dtype)
    profiles = chosen.profiles(network, tokenizer, compared, folder)
    from thinkkv.sdk.evaluation.runner import Evaluation

    evaluation = Evaluation(network, tokenizer, compared, profiles, seed, batch_tokens)
    found = _run(evaluation, evaluation.cells(asked, sizes, QUESTIONS[question]), count, folder)
    result = {"model": chosen.model, **found, "seconds": round(time.monotonic() - start, 1)}
    _finish(folder, result)
    if as_json:
        print_json(result)
    _show(result, folder)


def _run(evaluation: Evaluation, cells: Sequence[Cell], samples: int, folder: Path) -> dict[str, Any]:
    """Evaluate, resuming what the folder has, and summarise."""
    from thinkkv.sdk.evaluation.journal import Journal
    from thinkkv.sdk.evaluation.rows import rows
    from thinkkv.sdk.machine import described

    begun = described("thinkkv")  # a checkout may move on while a run lasts
    identity = evaluation.identity
    journal = Journal(folder / "samples.jsonl", identity, evaluation.calibrations, evaluation.options)
    if journal.outcomes:
        console.print(f"going on in {folder}, which holds {len(journal.outcomes)} outcomes", highlight=False)
    evaluation.run(cells, samples, journal, track)
    found = rows(journal, cells, evaluation.settings, samples)
    noted = {"profiles": journal.profiles, "options": journal.options}
    return {**identity, **noted, "rows": found, **begun}


def _finish(folder: Path, result: Mapping[str, Any]) -> None:
    with progress("drawing"):
        from thinkkv.sdk.evaluation.picture import draw_scores
        from thinkkv.sdk.files import write_whole
        from thinkkv.sdk.outputs import finish

        write_whole(folder / "scores.png", draw_scores(result["rows"], f"{result['model']}, {result['dtype']}"))
    finish(folder, result)


def _show(result: Mapping[str, Any], folder: Path) -> None:
    """A table per task and way of asking; a policy a line."""
    rows = result["rows"]
    for panel in dict.fromkeys(_panel(row) for row in rows):
        mine = [row for row in rows if _panel(row) == panel]
        title = "{task}, {context} tokens, question {question}, {samples} samples".format(**mine[0])
        columns = ("ratio", mine[0]["metric"], "95 %", "loss", "divergence", "cache\nMiB", "used\nMiB")
        table = settings_table(after=columns, title=title)
        for row in mine:
            table.add_row(*_cells(row))
        console.print(table)
    console.print(f"rows, samples and scores.png are in {folder}", highlight=False)


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    interval = "-" if row["ci95"] is None else "{:.2f}-{:.2f}".format(*row["ci95"])
    sizes = (f"{row[name] / 2**20:.1f}" for name in ("cache_bytes", "used_bytes"))
    loss, divergence = (
        "-" if row[name] is None else f"{row[name]:.{digits}f}"
        for name, digits in (("answer_loss", 2), ("divergence", 3))
    )
    return row["policy"], f"{row['ratio']:g}", f"{row['score']:.3f}", interval, loss, divergence, *sizes


def _panel(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["context"], row["question"]
