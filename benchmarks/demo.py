"""The first look: a real model, a real long prompt, the full cache beside Task-KV at 40 % of the bytes.

    make demo          (or: python benchmarks/demo.py --questions 3)

Asks SmolLM2-135M about a text of more than 4,500 tokens under each policy, prints the answers, speeds and bytes, and
writes the head maps and ``result.json``. ``retrieval-kv`` is this project's own policy, beside the paper's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environment import save
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from thinkkv import sdk
from thinkkv.sdk.cli.console import quiet_libraries, track

if TYPE_CHECKING:
    from thinkkv.sdk.generate_text import Generated

PROMPTS = Path(__file__).parent.parent / "sdk" / "prompts"
console = Console(width=None if sys.stdout.isatty() else 100)


def main() -> None:
    """Calibrate, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("thinkkv-out/demo"))
    arguments = parser.parse_args()
    quiet_libraries()
    from thinkkv.sdk.generate_text import generate_text  # after the libraries it loads were told to be quiet

    start = time.monotonic()
    model, tokenizer = sdk.load(arguments.model)
    console.print(f"loaded {arguments.model} in {time.monotonic() - start:.0f} s")
    profiles = {score: calibrated(model, tokenizer, score, arguments.out) for score in ("distance", "retrieval")}
    settings = {"full": None, "task-kv": profiles["distance"], "retrieval-kv": profiles["retrieval"]}
    text = (PROMPTS / "demo.txt").read_text(encoding="utf-8").strip()
    rows = []
    for asked in json.loads((PROMPTS / "demo_questions.json").read_text(encoding="utf-8"))[: arguments.questions]:
        console.rule(asked["question"])
        console.print(f"the fact stands in the {asked['where']} of the text; expected: [bold]{asked['answer']}[/bold]")
        answers = {}
        for policy, profile in settings.items():
            # Task-KV tells its heads apart per prompt, as the paper does; its profile is drawn, not used.
            answers[policy] = generate_text(
                model,
                tokenizer,
                f"{text}\n\n{asked['question']}",
                policy=policy,
                ratio=arguments.ratio,
                profile=profile if policy == "retrieval-kv" else None,
                max_new_tokens=arguments.max_new_tokens,
            )
            show_answer(policy, answers[policy], asked["answer"])
            rows.append({"question": asked["question"], "expected": asked["answer"], **row(answers[policy])})
        show_table(answers)
    save(arguments.out / "result.json", {"rows": rows, "seconds": round(time.monotonic() - start, 1)})
    console.print(f"done in {time.monotonic() - start:.0f} s; head maps: {arguments.out}/*/heads.png")


def calibrated(model: Any, tokenizer: Any, score: str, out: Path) -> sdk.HeadProfile:
    """A head profile, saved with its picture; that of the last run where there is one of this model."""
    folder = out / score
    try:
        profile = sdk.HeadProfile.load(folder)
        sdk.apply(model, profile=profile).revert()
    except sdk.ProfileMismatchError:
        profile = sdk.calibrate(model, tokenizer, score=score, progress=track(f"calibrating head profile by {score}"))
        profile.save(folder)
    console.print(f"head map by {score}: {folder / 'heads.png'}")
    return profile


def row(done: Generated) -> dict[str, Any]:
    """A generation as JSON values."""
    return {
        "policy": done.policy,
        "text": done.text,
        "prompt_tokens": done.prompt_tokens,
        "prefill_seconds": round(done.prefill_seconds, 2),
        "decode_tokens_per_second": round(done.tokens_per_second or 0, 1),
        "bytes": vars(done.bytes),
    }


def show_answer(policy: str, done: Generated, expected: str) -> None:
    """The answer, and whether the expected words occur in it."""
    verdict = "[green]right[/green]" if expected.lower() in done.text.lower() else "[red]wrong[/red]"
    console.print(f"[bold]{policy}[/bold] ({verdict}): {done.text.strip()}")


def show_table(answers: dict[str, Generated]) -> None:
    """Speeds and bytes side by side."""
    table = Table(
        box=SIMPLE, padding=(0, 1), title=f"{next(iter(answers.values())).prompt_tokens} prompt tokens; bytes in MiB"
    )
    for column in (
        "policy",
        "prefill s",
        "tokens/s",
        "full",
        "promised",
        "planned",
        "used",
        "physical",
    ):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for policy, done in answers.items():
        speed = done.tokens_per_second or float("nan")
        sizes = (f"{value / 2**20:.1f}" for value in vars(done.bytes).values())
        table.add_row(policy, f"{done.prefill_seconds:.1f}", f"{speed:.1f}", *sizes)
    console.print(table)


if __name__ == "__main__":
    main()
