"""``thinkkv export``: bake head classes and merged weights into files that stock runtimes load."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from thinkkv.patches.errors import ExportError
from thinkkv.sdk.cli.console import console, print_json, progress, track
from thinkkv.sdk.cli.loading import load
from thinkkv.sdk.cli.options import budget_options, check_budget, dtype_option, json_option, share_a_profile

if TYPE_CHECKING:
    from thinkkv.export.newest import Choice
    from thinkkv.sdk.profile import HeadProfile

EXPORT_POLICIES = ("full", "task-kv", "retrieval-kv")


@click.command(
    epilog="""\b
Examples:
  thinkkv export --format onnx                        (the newest `thinkkv patch` or `thinkkv train`)
  thinkkv export --model smollm2-135m --format onnx --quantize int4 --ratio 0.25
  thinkkv export --model ./base --adapter ./lora --format gguf --out my-gguf"""
)
@click.option("--model", metavar="M", help="Alias, hub id, folder or GGUF file.  [default: of the newest output]")
@click.option(
    "--format", "format_", type=click.Choice(("safetensors", "onnx", "gguf")), required=True, help="What to write."
)
@click.option("--adapter", type=click.Path(path_type=Path), help="PEFT adapter to merge.")
@click.option("--profile", type=click.Path(path_type=Path), help="Profile folder.  [default: calibrate one]")
@click.option("--policy", type=click.Choice(EXPORT_POLICIES), help="Which heads keep everything.")
@budget_options
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Prompt length that the ratio refers to.  [default: the model's context, at most 8192]",
)
@click.option("--quantize", type=click.Choice(("none", "int8", "int4")), default="none", show_default=True)
@click.option(
    "--builder-option",
    "builder_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Extra option of onnxruntime-genai's builder, e.g. algo_config=k_quant_mixed.  [repeatable]",
)
@click.option(
    "--provider",
    type=click.Choice(("cpu", "cuda", "webgpu")),
    default="cpu",
    show_default=True,
    help="ONNX execution provider that the graph is for.",
)
@click.option("--native", is_flag=True, help="Add ONNX operators in C, compiled for this processor: decodes faster.")
@click.option(
    "--cache-dtype",
    type=click.Choice(("float32", "float16")),
    help="Numbers of a --native bundle's caches.  [default: float32]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: below thinkkv-out/]")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@click.option("--verify/--no-verify", default=True, help="Compare greedy tokens with PyTorch.  [default: verify]")
@dtype_option
@json_option
def export(
    model: str | None,
    format_: Literal["safetensors", "onnx", "gguf"],
    adapter: Path | None,
    profile: Path | None,
    policy: str | None,
    ratio: float | None,
    budget: int | None,
    context: int | None,
    quantize: Literal["none", "int8", "int4"],
    builder_options: tuple[str, ...],
    provider: Literal["cpu", "cuda", "webgpu"],
    native: bool,
    cache_dtype: Literal["float32", "float16"] | None,
    out: Path | None,
    force: bool,
    verify: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Export a model with its head classes: safetensors, ONNX or GGUF.

    Without --model, model, profile and adapter come from the newest finished `thinkkv patch` or `thinkkv train`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed export cleans up as an interrupted one
    check_budget(ratio, budget)
    start = time.monotonic()
    from thinkkv.export.onnx.options import OnnxOptions
    from thinkkv.export.staging import check_target

    onnx = OnnxOptions(provider, builder_options, native, cache_dtype)
    onnx.check_format(format_)
    choice = _choice(model, adapter, profile, policy, ratio, budget)
    from thinkkv.sdk import model_sources
    from thinkkv.sdk.outputs import default_folder

    source = model_sources.resolve(choice.model)
    suffix = format_ if quantize == "none" else f"{format_}-{quantize}"
    target = out or default_folder("export", f"{source.label}-{suffix}")
    check_target(target, force=force)
    if format_ == "onnx":
        from thinkkv.export.onnx.builder import check_installed

        check_installed()
    network, tokenizer = load(choice.model, dtype)
    baked = _baked(network, tokenizer, choice, context, source.label, source.location)
    from thinkkv.export.export import export as write

    with progress(f"writing {format_}" + (" and verifying" if verify else "")):
        done = write(
            baked,
            target,
            format=format_,
            quantize=quantize,
            onnx=onnx,
            force=force,
            verify=verify,
        )
    result = done.as_json() | {
        "model": source.label,
        "policy": baked.block.policy,
        "ratio": baked.block.ratio,
        "budget": baked.block.budget,
        "context": baked.block.context,
        "kept": baked.block.kept,
        "heterogeneous": baked.block.heterogeneous,
        "quantize": quantize,
        "provider": provider,
        "native": native,
        "cache_dtype": cache_dtype,
        "seconds": round(time.monotonic() - start, 1),
    }
    if as_json:
        print_json(result)
    _show(result)


def _choice(
    model: str | None,
    adapter: Path | None,
    profile: Path | None,
    policy: str | None,
    ratio: float | None,
    budget: int | None,
) -> Choice:
    """What the command line says, and for the rest the newest output."""
    from thinkkv.export.newest import Choice, newest_choice
    from thinkkv.sdk.patching import DEFAULT_RATIO

    found = Choice(model) if model else newest_choice()
    if not model:
        console.print(f"exporting model {found.model} as in {found.found_in}", highlight=False)
    if policy is not None and policy != found.policy:
        shared = found.profile if share_a_profile(policy, found.policy) else None
        found = replace(found, policy=policy, profile=shared)
    _check_policy(found)
    if ratio is not None or budget is not None:
        found = replace(found, ratio=ratio, budget=budget)
    elif found.ratio is None and found.budget is None:
        found = replace(found, ratio=DEFAULT_RATIO)
    return replace(found, adapter=adapter or found.adapter, profile=profile or found.profile)


def _check_policy(choice: Choice) -> None:
    """Raise ExportError for a policy whose choice cannot be baked: it is made anew for every prompt."""
    if choice.policy in (None, *EXPORT_POLICIES):
        return
    serving = [name for name in EXPORT_POLICIES if share_a_profile(name, choice.policy)]
    instead = f"--policy {serving[0]}, which takes its profile" if serving else f"--policy {', '.join(EXPORT_POLICIES)}"
    raise ExportError(f"{choice.found_in} is of {choice.policy}, which cannot be exported - name {instead}")


def _baked(network: Any, tokenizer: Any, choice: Choice, context: int | None, label: str, location: str) -> Any:
    from thinkkv.export.bake import bake
    from thinkkv.sdk.budget import Budget
    from thinkkv.sdk.policies import policy_named
    from thinkkv.sdk.profile import HeadProfile

    profile = HeadProfile.load(choice.profile) if choice.profile else None
    policy = choice.policy or (profile.policy if profile else "task-kv")
    if profile is None and policy != "full":
        profile = _calibrated(network, tokenizer, policy)
    whole = policy == "full"
    return bake(
        network,
        tokenizer,
        policy=policy_named(policy),
        budget=Budget(ratio=1.0) if whole else Budget(ratio=choice.ratio, tokens=choice.budget),
        profile=None if whole else profile,
        adapter=choice.adapter,
        context=context,
        label=label,
        location=location,
    )


def _calibrated(network: Any, tokenizer: Any, policy: str) -> HeadProfile:
    from thinkkv.sdk.calibration import calibrate
    from thinkkv.sdk.profile import score_for

    score = score_for(policy)
    return calibrate(network, tokenizer, score=score, progress=track(f"calibrating heads by {score}"))


def _show(result: dict[str, Any]) -> None:
    """What was written, what was checked, how to run it; on stderr."""
    size = sum(file["bytes"] for file in result["files"])
    full, heads = sum(map(len, result["heterogeneous"])), result["verified"]
    console.print(
        f"{result['folder']}: {len(result['files'])} files, {size / 1e6:,.1f} MB; {full} KV heads keep everything, "
        f"the others {result['kept']} tokens of a prompt of {result['context']}",
        highlight=False,
    )
    equal = {True: "equal", False: "NOT all equal", None: "not compared"}[heads["greedy_tokens_equal"]]
    agreement = "" if heads["agreement"] is None else f", {heads['agreement']:.0%} agree when fed the same text"
    console.print(
        f"verified: {heads['compared']} greedy tokens {equal} ({heads['against']}){agreement}", highlight=False
    )
    console.print(f"run it:  {_how_to_run(result)}", highlight=False, soft_wrap=True)


def _how_to_run(result: dict[str, Any]) -> str:
    folder = result["folder"]
    if result["format"] == "safetensors":
        return f"from thinkkv import sdk; model, tokenizer = sdk.load({folder!r})"
    if result["format"] == "gguf":
        return f"llama-cli -m {folder}/model.gguf    (llama.cpp keeps the full cache in every head)"
    if result["provider"] != "cpu":
        return f"onnxruntime-genai with the {result['provider']} provider on {folder}"
    return f'thinkkv run {folder} --prompt "..."' + (" --native" if result["native"] else "")
