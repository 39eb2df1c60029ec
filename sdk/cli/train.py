"""``thinkkv train``: run a recipe that trains a model to think shorter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from thinkkv.sdk.cli.console import console, print_json, progress
from thinkkv.sdk.cli.options import json_option
from thinkkv.sdk.extras import require

if TYPE_CHECKING:
    from thinkkv.recipes.config import Recipe
    from thinkkv.recipes.dry_run import Plan
    from thinkkv.recipes.evaluation import Evaluation

COLOURS = ("dim", "cyan", "green", "bold yellow")
"""Of a step, from redundant to critical."""


@click.command(
    epilog="""\b
Examples:
  thinkkv train recipes/tiny.yaml
  thinkkv train recipes/scpo.yaml --dry-run
  thinkkv train my.yaml --set model.name=qwen2.5-1.5b --set stages.2.args.max_steps=200
  accelerate launch -m thinkkv.sdk.cli train recipes/scpo.yaml"""
)
@click.argument("recipe", metavar="RECIPE.yaml")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Change a setting; repeatable.")
@click.option("--dry-run", is_flag=True, help="Check everything and show what would run; write nothing.")
@click.option("--resume", type=click.Choice(("auto", "never")), help="Go on with a killed run, or start over.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run folder.  [default: the recipe's]")
@json_option
def train(
    recipe: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    resume: Literal["auto", "never"] | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Train a model to think shorter, stage by stage.

    RECIPE.yaml is a file, or the name of a packaged recipe: scpo, sft, grpo_length, smollm2, tiny. A killed run goes on
    where it stopped when the same command is given again.
    """
    require(("trl", "peft", "accelerate", "datasets", "yaml"), extra="train", purpose="a recipe")
    from thinkkv.recipes.config import find, load

    given = (*overrides, *([f"resume={resume}"] if resume else []))
    settings = load(find(recipe), given)
    if dry_run:
        _dry_run(settings, as_json)
    else:
        _train(settings, out, as_json)


def _dry_run(recipe: Recipe, as_json: bool) -> None:
    console.print(recipe.dump(), markup=False)
    with progress("loading libraries"):
        from thinkkv.recipes.dry_run import plan
    with progress("checking"):
        found = plan(recipe)
    _show_plan(found)
    if as_json:
        print_json(
            {
                "dry_run": True,
                "recipe": recipe.as_dict(),
                "prompts": found.prompts[0],
                "stages": [
                    {"kind": kind, "sampled_tokens_at_most": sampled, "trained_tokens_at_most": trained}
                    for kind, sampled, trained in found.stages
                ],
                "bytes": found.bytes,
            }
        )


def _train(recipe: Recipe, out: Path | None, as_json: bool) -> None:
    from thinkkv.sdk.outputs import finish, output_folder

    folder = output_folder("train", recipe.name, out or (Path(recipe.output.dir) if recipe.output.dir else None))
    with progress("loading libraries"):
        from thinkkv.recipes.processes import Processes
        from thinkkv.recipes.runner import run
    result = run(recipe, folder, ConsoleReporter())
    if not Processes.current().main:
        return
    finish(folder, result)
    _show(result, folder)
    if as_json:
        print_json(result)


class ConsoleReporter:
    """Progress on stderr: a line now and then, with speed and time left."""

    def __init__(self) -> None:
        self._start = self._shown = time.monotonic()
        self._first = 0
        self._kind = ""

    def stage(self, index: int, total: int, kind: str, skipped: bool) -> None:
        """A stage begins, or was finished before."""
        done = ": finished before, skipped" if skipped else ""
        console.print(f"stage {index + 1} of {total}: {kind}{done}", highlight=False)
        self._start, self._first, self._kind = time.monotonic(), -1, kind

    def step(self, step: int, total: int, values: dict[str, Any]) -> None:
        """A step was logged; on a terminal all of them are shown, elsewhere one every ten seconds."""
        now = time.monotonic()
        if self._first < 0:
            self._first, self._start = step, now
        if step < total and now - self._shown < (1 if console.is_terminal else 10):
            return
        self._shown = now
        parts = [f"{self._kind} {step}/{total}", *_values(values)]
        if step > self._first:
            parts.append(f"{_clock((now - self._start) / (step - self._first) * (total - step))} left")
        console.print("  " + ", ".join(parts), highlight=False, soft_wrap=True)

    def evaluated(self, when: str, found: Evaluation) -> None:
        """The model was evaluated."""
        share = "-" if found.critical_share is None else f"{found.critical_share:.2f}"
        console.print(
            f"  {when}: accuracy {found.accuracy:.3f} +- {found.ci95:.3f}, {found.mean_tokens:.1f} tokens, "
            f"critical share {share}",
            highlight=False,
        )

    def note(self, text: str) -> None:
        """Something worth a line."""
        console.print(f"  {text}", highlight=False)


_SHOWN_VALUES = (
    ("loss", "loss {:.3f}"),
    ("accuracy", "accuracy {:.2f}"),
    ("completions/mean_length", "{:.0f} tokens"),
    ("mean_tokens", "{:.0f} tokens"),
    ("scpo/critical_share", "critical {:.2f}"),
    ("tokens_per_second", "{:.0f} tokens/s"),
    ("step_time", "{:.1f} s a step"),
)


def _values(values: dict[str, Any]) -> list[str]:
    return [form.format(values[name]) for name, form in _SHOWN_VALUES if isinstance(values.get(name), (int, float))]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _show_plan(plan: Plan) -> None:
    from rich.text import Text

    console.print(f"{plan.prompts[0]} prompts, the longest of {plan.prompts[1]} tokens", highlight=False)
    for kind, sampled, trained in plan.stages:
        console.print(f"  {kind}: samples at most {sampled:,} tokens, trains on at most {trained:,}", highlight=False)
    total = sum(plan.bytes.values())
    console.print(f"memory, about {total / 2**30:.2f} GiB without activations:", highlight=False)
    for name, value in plan.bytes.items():
        console.print(f"  {name}: {value / 2**30:.2f} GiB", highlight=False)
    for shown in plan.shown:
        text = Text(shown.prompt, style="italic")
        for step, weight in shown.steps:
            text.append(f"[{weight:.2f}]", style="dim")
            text.append(step, style=_colour(weight))
        text.append(shown.answer)
        console.print(text)


def _colour(weight: float) -> str:
    return COLOURS[min(len(COLOURS) - 1, int(weight * len(COLOURS)))]


def _show(result: dict[str, Any], folder: Path) -> None:
    """The summary table, and a few responses with their steps coloured by weight."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("stage", "steps", "accuracy", "mean tokens", "critical share"):
        table.add_column(column)
    for stage in result["stages"]:
        cells = [_change(stage[key], form) for key, form in _CHANGES]
        table.add_row(stage["kind"], str(stage["steps"]), *cells)
    console.print(table)
    _show_responses(folder / "completions.jsonl")
    console.print(f"everything is in {folder}", highlight=False)


_CHANGES = (("accuracy", ".3f"), ("mean_tokens", ".1f"), ("critical_share", ".2f"))


def _change(pair: dict[str, Any], form: str) -> str:
    return " -> ".join("-" if pair[when] is None else format(pair[when], form) for when in ("before", "after"))


def _show_responses(path: Path) -> None:
    import json

    from rich.text import Text

    lines = path.read_text(encoding="utf-8").splitlines()[:2] if path.exists() else []
    for line in lines:
        response = json.loads(line)
        text = Text(response["prompt"][-200:], style="italic")
        weights = response["weights"] or [0.0] * len(response["steps"])
        for step, weight in zip(response["steps"], weights, strict=True):
            text.append(step, style=_colour(weight))
        text.append(response["answer"] + (" (right)" if response["right"] else " (wrong)"))
        console.print(text)
