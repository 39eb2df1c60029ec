"""``thinkkv generate``: run a prompt on a patched model and say what the cache held."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from thinkkv.sdk.cli.console import console, print_json, progress
from thinkkv.sdk.cli.loading import load
from thinkkv.sdk.cli.options import (
    CACHE_DTYPES,
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
    from thinkkv.sdk.policies.policy import CacheDtype

IDLE = {
    "save_cache": ({"load_cache", "compiled", "max_new_tokens", "temperature"}, "it generates nothing"),
    "load_cache": (
        {"policy", "ratio", "budget", "profile", "decode", "cache_dtype", "raw"},
        "the file says what is kept, and how a question is put",
    ),
}
"""Options that have no say beside one of these, and why."""


@click.command(
    epilog="""\b
Examples:
  thinkkv generate --model smollm2-135m --prompt "Why is the sky blue?"
  thinkkv generate --model smollm2-135m --policy full --prompt-file report.txt --json
  cat report.txt | thinkkv generate            (model and profile of the newest `thinkkv patch`)
  thinkkv generate --prompt-file report.txt --save-cache report.safetensors
  thinkkv generate --load-cache report.safetensors --prompt 'Who wrote it?'"""
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
    type=click.Choice(CACHE_DTYPES),
    help="Store tokens in the model's dtype, in int8, or keys in int8 and values in five or four bits: half the "
    "bytes of 16 bits, or 44 % or 41 % of them, so that a ratio keeps as many more.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the decode step: about a minute at first, then faster. Worth it for long texts.",
)
@prompt_options
@click.option(
    "--save-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Read the prompt, write its compressed cache to FILE, and generate nothing.",
)
@click.option(
    "--load-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Answer the prompt as a question about the text whose cache is in FILE.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    help="Sample at this temperature.  [default: greedy]",
)
@dtype_option
@json_option
@click.pass_context
def generate(
    context: click.Context,
    model: str | None,
    profile: Path | None,
    policy: str | None,
    ratio: float | None,
    budget: int | None,
    decode: Literal["append", "bounded"],
    cache_dtype: CacheDtype | None,
    compiled: bool,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    save_cache: Path | None,
    load_cache: Path | None,
    temperature: float | None,
    raw: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Generate text with a heterogeneous cache.

    The prompt comes from --prompt, --prompt-file or standard input. A checkpoint that `thinkkv export` wrote brings
    its own policy, budget and profile. A text that is asked about more than once need be read once only: --save-cache,
    then --load-cache with each question.
    """
    check_budget(ratio, budget)
    _check_given(context)
    text = prompt_text(prompt, prompt_file)
    answering: dict[str, Any] = {"compiled": compiled, "max_new_tokens": max_new_tokens, "temperature": temperature}
    if load_cache is not None:
        _ask(load_cache, text, model, dtype, as_json, **answering)
        return
    if model is None:
        model, profile, policy, ratio, budget = _newest(profile, policy, ratio, budget)
    profile, policy, ratio, budget = _as_baked(model, profile, policy, ratio, budget)
    patch: dict[str, Any] = {
        "policy": policy, "ratio": ratio, "budget": budget, "profile": profile, "decode": decode,
        "cache_dtype": cache_dtype,
    }  # fmt: skip
    if save_cache is not None:
        _read(save_cache, text, model, dtype, as_json, raw, **patch)
        return
    network, tokenizer = load(model, dtype)
    from thinkkv.sdk.generate_text import generate_text

    heard = None if as_json else echo
    _show(generate_text(network, tokenizer, text, chat=not raw, echo=heard, **patch, **answering), as_json)


def _check_given(context: click.Context) -> None:
    """Refuse options that have no say where a cache is saved or loaded."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = {name for name in options if context.get_parameter_source(str(name)) is ParameterSource.COMMANDLINE}
    for name, (others, why) in IDLE.items():
        if name in given and others & given:
            idle = ", ".join(sorted(options[other] for other in others & given))
            raise click.UsageError(f"{idle} cannot be given with {options[name]} - {why}")


def _read(path: Path, text: str, model: str, dtype: str | None, as_json: bool, raw: bool, **patch: Any) -> None:
    """Read a text, and keep its cache."""
    from thinkkv.sdk.saved_cache import check_place
    from thinkkv.sdk.saved_text import read_text

    check_place(path)
    network, tokenizer = load(model, dtype)
    name = str(Path(model).absolute()) if Path(model).exists() else model
    with progress("reading"):
        done = read_text(network, tokenizer, text, path, name=name, chat=not raw, **patch)
    if as_json:
        print_json(done.as_json())
    console.print(
        f"{done.policy}: {done.prompt_tokens} prompt tokens, {done.file_bytes:,} bytes in {path}", highlight=False
    )
    show_bytes(vars(done.bytes))


def _ask(path: Path, question: str, model: str | None, dtype: str | None, as_json: bool, **answering: Any) -> None:
    """Answer a question about a text whose cache was kept."""
    from thinkkv.sdk.saved_text import SavedText, ask

    saved = SavedText.of(path)
    network, tokenizer = load(model or saved.model, dtype or saved.dtype)
    _show(ask(network, tokenizer, question, path, echo=None if as_json else echo, **answering), as_json)


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


def _show(done: Generated, as_json: bool) -> None:
    """The end of the text, or the object, on stdout; speeds and bytes on stderr."""
    if as_json:
        print_json(done.as_json())
    else:
        echo("\n")
    prefill = done.prompt_tokens / max(done.prefill_seconds, 1e-9)
    decode = f" at {done.tokens_per_second:.1f}/s" if done.tokens_per_second else ""
    compiling = f", compiled in {done.compile_seconds:.0f} s" if done.compile_seconds else ""
    console.print(
        f"{done.policy}: {done.prompt_tokens} prompt tokens at {prefill:.0f}/s, "
        f"{done.new_tokens} new{decode}{compiling}",
        highlight=False,
    )
    show_bytes(vars(done.bytes))
