"""``thinkkv patch``: load a model, calibrate a head profile, verify the patch, save the profile and its picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.cli.console import console, print_json, progress, track
from thinkkv.sdk.cli.loading import load
from thinkkv.sdk.cli.options import (
    PROFILE_SCORES,
    budget_options,
    check_budget,
    dtype_option,
    json_option,
    policy_option,
    read_text,
)

if TYPE_CHECKING:
    from thinkkv.sdk.profile import HeadProfile
    from thinkkv.sdk.report import Report

VERIFIED_TOKENS = 1024
"""Prompts are cut to this length for the check against dense attention, which is quadratic."""


@click.command(
    epilog="""\b
Examples:
  thinkkv patch --model smollm2-135m
  thinkkv patch --model ./my-qwen2 --ratio 0.25 --task prompts.jsonl --out profiles/math
  thinkkv patch --model smollm2-135m --score retrieval --json"""
)
@click.option("--model", required=True, metavar="M", help="Alias, hub id, checkpoint folder or GGUF file.")
@policy_option
@click.option(
    "--score",
    type=click.Choice(("distance", "retrieval")),
    help="What the heads are told apart by.  [default: what the policy needs]",
)
@budget_options
@click.option(
    "--task",
    type=click.Path(path_type=Path),
    help='Prompts to calibrate on: JSON lines with "prompt", or one plain text.  [default: a small built-in set]',
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Profile folder.  [default: below thinkkv-out/]",
)
@dtype_option
@json_option
def patch(
    model: str,
    policy: str | None,
    score: str | None,
    ratio: float | None,
    budget: int | None,
    task: Path | None,
    out: Path | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Calibrate, verify and save a head profile for a model.

    Loads the model, scores its KV heads over a few prompts, proves the patch (full budget: the same tokens; compressed:
    the same logits as dense attention under the same mask; bytes as promised), and writes profile.json and heads.png.
    """
    check_budget(ratio, budget)
    start = time.monotonic()
    policy, score = _policy_and_score(policy, score)
    prompts = None if task is None else _task_prompts(task)
    from thinkkv.sdk.model_sources import resolve
    from thinkkv.sdk.outputs import finish, output_folder

    resolve(model)  # before a folder is made for it
    folder = output_folder("patch", f"{Path(model).name}-{policy}", out)
    network, tokenizer = load(model, dtype)
    result = _run(network, tokenizer, policy, score, ratio, budget, prompts, folder)
    result = {"model": model, **result, "seconds": round(time.monotonic() - start, 2)}
    finish(folder, result)
    if as_json:
        print_json(result)
    _show(result)
    if not all(value for value in result["verified"].values() if isinstance(value, bool)):
        raise ThinkKVError(
            f"the patch did not pass its verification ({result['verified']}) - do not use this profile; "
            "please report the model and versions from `thinkkv doctor`"
        )


def _policy_and_score(policy: str | None, score: str | None) -> tuple[str, str | None]:
    """Each of the two follows from the other; only the policies with classes have a score."""
    policy = policy or next((name for name, own in PROFILE_SCORES.items() if own == score), "task-kv")
    wanted = PROFILE_SCORES.get(policy)
    if score is not None and score != wanted:
        served = " or ".join(name for name, own in PROFILE_SCORES.items() if own == score)
        raise click.UsageError(
            f"{policy} does not use {score} scores - "
            + (f"use --score {wanted}" if wanted else f"drop --score, or use --policy {served}")
        )
    return policy, wanted


def _task_prompts(path: Path) -> list[str]:
    """Prompts of a task file."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        prompts = [text] if text.strip() else []
    else:
        prompts = [_task_prompt(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not prompts:
        raise ThinkKVError(f"{path} holds no prompt - give JSON lines with a prompt each, or a plain text")
    return prompts


def _task_prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ThinkKVError(f'{path} line {number} has no text under "prompt" - write {{"prompt": "..."}} on each line')
    return prompt


def _run(
    model: Any,
    tokenizer: Any,
    policy_name: str,
    score: str | None,
    ratio: float | None,
    budget: int | None,
    prompts: list[str] | None,
    folder: Path,
) -> dict[str, Any]:
    """Calibrate, verify, measure, save; the result without the model's name."""
    import torch

    from thinkkv.sdk.calibration import calibrate
    from thinkkv.sdk.hidden_facts import builtin_prompts
    from thinkkv.sdk.patching import DEFAULT_RATIO
    from thinkkv.sdk.policies import policy_named
    from thinkkv.sdk.verification import verify

    ratio = DEFAULT_RATIO if ratio is None and budget is None else ratio
    prompts = prompts or builtin_prompts()
    longest = max((tokenizer(text, return_tensors="pt").input_ids for text in prompts), key=lambda ids: ids.shape[1])
    profile = calibrate(model, tokenizer, prompts, score=score, progress=track("calibrating")) if score else None
    policy = policy_named(policy_name)
    report = _measure(model, longest, policy_name, ratio, budget, profile)
    with progress("verifying against the stock model and dense attention"):
        checks = verify(
            model,
            torch.as_tensor(longest[:, :VERIFIED_TOKENS]),
            policy=policy,
            ratio=ratio,
            budget=budget,
            profile=profile,
        )
    if profile:
        profile.save(folder)
    return {
        "architecture": model.config.model_type,
        "policy": policy_name,
        "score": score,
        "ratio": ratio,
        "budget": budget,
        "layers": len(report.layers),
        "kv_heads": model.config.num_key_value_heads,
        "heterogeneous": [list(heads) for heads in profile.heterogeneous] if profile else [[] for _ in report.layers],
        "prompt_tokens": longest.shape[1],
        "bytes": vars(report.bytes),
        "verified": vars(checks),
        "profile": str(folder) if profile else None,
    }


def _measure(
    model: Any, ids: Any, policy: str, ratio: float | None, budget: int | None, profile: HeadProfile | None
) -> Report:
    """The cache right after the prefill of one prompt."""
    import torch

    from thinkkv.sdk.patching import apply

    with (
        torch.inference_mode(),
        apply(model, policy=policy, ratio=ratio, budget=budget, profile=profile) as handle,
    ):
        cache = handle.new_cache()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return handle.report(cache)


def _show(result: dict[str, Any]) -> None:
    """The summary table."""
    from rich.table import Table

    table = Table(title=f"{result['model']} ({result['architecture']}), {result['policy']}", show_header=False)
    heads = sum(len(layer) for layer in result["heterogeneous"])
    table.add_row("layers x KV heads", f"{result['layers']} x {result['kv_heads']}")
    table.add_row("heterogeneous KV heads", f"{heads} of {result['layers'] * result['kv_heads']}")
    table.add_row("budget", f"ratio {result['ratio']:g}" if result["ratio"] else f"{result['budget']} tokens per head")
    full = result["bytes"]["full"]
    for name, value in result["bytes"].items():
        table.add_row(f"{name} bytes", f"{value:,} ({value / full:.1%} of full, {result['prompt_tokens']} tokens)")
    for name, value in result["verified"].items():
        table.add_row(
            name.replace("_", " "), f"{value:.2e}" if isinstance(value, float) else ("yes" if value else "NO")
        )
    table.add_row("profile", result["profile"] or "none (this policy has no classes)")
    table.add_row("seconds", f"{result['seconds']}")
    console.print(table)
