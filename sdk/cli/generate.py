"""``thinkkv generate``: run a prompt on a patched model and say what the cache held."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from thinkkv.sdk.cli.console import console, print_json
from thinkkv.sdk.cli.loading import load
from thinkkv.sdk.cli.options import (
    budget_options,
    check_budget,
    dtype_option,
    json_option,
    policy_option,
    share_a_profile,
)
from thinkkv.sdk.cli.text import echo, prompt_options, prompt_text, show_bytes

if TYPE_CHECKING:
    from thinkkv.sdk.generate_text import Generated


@click.command(
    epilog="""\b
Examples:
  thinkkv generate --model smollm2-135m --prompt "Why is the sky blue?"
  thinkkv generate --model smollm2-135m --policy full --prompt-file report.txt --json
  cat report.txt | thinkkv generate            (model and profile of the newest `thinkkv patch`)"""
)
@click.option(
    "--model",
    metavar="M",
    help="Alias, hub id, folder or GGUF file.  [default: of the newest `thinkkv patch`]",
)
@click.option("--profile", type=click.Path(path_type=Path), help="Profile folder that fixes the classes of the heads.")
@policy_option
@budget_options
@click.option(
    "--decode",
    type=click.Choice(("append", "bounded")),
    default="append",
    show_default=True,
    help="Whether other than full heads keep every new token, or stay at the size they had after the prompt.",
)
@click.option(
    "--cache-dtype",
    type=click.Choice(("model", "int8", "k8v4")),
    help="Store tokens in the model's dtype, in int8, or keys in int8 and values in int4: in half or two fifths of the "
    "bytes of 16 bits, so that a ratio keeps as many more.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the decode step: about a minute at first, then faster. Worth it for long texts.",
)
@prompt_options
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="Sample at this temperature.  [default: greedy]",
)
@dtype_option
@json_option
def generate(
    model: str | None,
    profile: Path | None,
    policy: str | None,
    ratio: float | None,
    budget: int | None,
    decode: Literal["append", "bounded"],
    cache_dtype: Literal["model", "int8", "k8v4"] | None,
    compiled: bool,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    temperature: float | None,
    raw: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Generate text with a heterogeneous cache.

    The prompt comes from --prompt, --prompt-file or standard input. A checkpoint that `thinkkv export` wrote brings
    its own policy, budget and profile.
    """
    check_budget(ratio, budget)
    text = prompt_text(prompt, prompt_file)
    if model is None:
        model, profile, policy, ratio, budget = _newest(profile, policy, ratio, budget)
    profile, policy, ratio, budget = _as_baked(model, profile, policy, ratio, budget)
    network, tokenizer = load(model, dtype)
    from thinkkv.sdk.generate_text import generate_text

    done = generate_text(
        network,
        tokenizer,
        text,
        policy=policy,
        ratio=ratio,
        budget=budget,
        profile=profile,
        decode=decode,
        cache_dtype=cache_dtype,
        compiled=compiled,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=not raw,
        echo=None if as_json else echo,
    )
    if as_json:
        print_json(done.as_json())
    else:
        echo("\n")
    _show(done)


def _newest(
    profile: Path | None, policy: str | None, ratio: float | None, budget: int | None
) -> tuple[str, Path | None, str | None, float | None, int | None]:
    """Model, profile and budget of the newest finished ``thinkkv patch``, except where the call says otherwise."""
    from thinkkv.sdk.outputs import newest_finished

    folder, result = newest_finished("patch")
    console.print(f"using model {result['model']} and profile of {folder}", highlight=False)
    policy = policy or result["policy"]
    if share_a_profile(policy, result["policy"]):
        profile = profile or (Path(result["profile"]) if result["profile"] else None)
    if ratio is None and budget is None:
        ratio, budget = result["ratio"], result["budget"]
    return result["model"], profile, policy, ratio, budget


def _as_baked(
    model: str, profile: Path | None, policy: str | None, ratio: float | None, budget: int | None
) -> tuple[Path | None, str | None, float | None, int | None]:
    """Profile, policy and budget of an exported checkpoint, except where the call says otherwise."""
    from thinkkv.sdk.baked import baked_options

    baked = baked_options(model)
    if baked is None:
        return profile, policy, ratio, budget
    if policy is None and profile is None:
        policy = baked.policy
    if share_a_profile(policy, baked.policy):
        profile = profile or baked.profile
    if ratio is None and budget is None:
        ratio, budget = baked.ratio, baked.budget
    return profile, policy, ratio, budget


def _show(done: Generated) -> None:
    """Speeds and bytes, on stderr."""
    prefill = done.prompt_tokens / max(done.prefill_seconds, 1e-9)
    decode = f" at {done.tokens_per_second:.1f}/s" if done.tokens_per_second else ""
    compiling = f", compiled in {done.compile_seconds:.0f} s" if done.compile_seconds else ""
    console.print(
        f"{done.policy}: {done.prompt_tokens} prompt tokens at {prefill:.0f}/s, "
        f"{done.new_tokens} new{decode}{compiling}",
        highlight=False,
    )
    show_bytes(vars(done.bytes))
