"""``thinkkv bench``: prefill, decode speed and memory under cache policies, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from thinkkv.sdk.cli.compared import Compared, compared_options, numbers, settings_table
from thinkkv.sdk.cli.console import console, print_json, progress, track
from thinkkv.sdk.cli.options import dtype_option, json_option

if TYPE_CHECKING:
    from thinkkv.sdk.evaluation.setting import Setting
    from thinkkv.sdk.speed.contender import Contender

POLICIES = "stock,full,task-kv"
ONNX_POLICIES = "full,task-kv"
QUICK = {"contexts": "500", "new_tokens": 12, "prefills": 1}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        contexts: tokens of the prompts.
        threads: to measure with; 0 for the runtime's own choice.
        new_tokens: decode steps.
        prefills: per setting.
        quantize: the weights of ONNX bundles.
        native: whether to measure them with operators in C, too.
        dtype: of torch weights and cache.
        memory: whether to measure peak memory.
    """

    contexts: Sequence[int]
    threads: Sequence[int]
    new_tokens: int
    prefills: int
    quantize: Literal["none", "int8", "int4"]
    native: bool
    dtype: str | None
    memory: bool


@click.command(
    epilog="""\b
Examples:
  thinkkv bench --model smollm2-135m --contexts 1000,4000 --policies stock,full,task-kv --ratio 0.4,0.25
  thinkkv bench --model smollm2-135m --runtime onnx --quantize int4 --threads 1,2
  thinkkv bench --model smollm2-135m --quick"""
)
@compared_options
@click.option("--runtime", type=click.Choice(("torch", "onnx")), default="torch", show_default=True)
@click.option("--threads", metavar="N,M", help="Threads of the runtime.  [default: its own choice]")
@click.option("--new-tokens", type=click.IntRange(min=1), help="Decode steps timed.  [default: 48]")
@click.option("--prefills", type=click.IntRange(min=1), help="Per setting.  [default: 3]")
@click.option("--memory/--no-memory", default=None, help="Peak memory, in a process per row.  [default: memory]")
@click.option(
    "--quantize", type=click.Choice(("none", "int8", "int4")), default="none", help="Weights of ONNX bundles."
)
@click.option("--native", is_flag=True, help="ONNX bundles with bounded caches a second time, with operators in C.")
@click.option("--quick", is_flag=True, help="A look: 500 tokens, 12 steps, no peak memory; below 3 minutes.")
@dtype_option
@json_option
def bench(
    model: str | None,
    profile: tuple[Path, ...],
    policies: str | None,
    ratio: str,
    contexts: str | None,
    out: Path | None,
    runtime: str,
    threads: str | None,
    new_tokens: int | None,
    prefills: int | None,
    memory: bool | None,
    quantize: Literal["none", "int8", "int4"],
    native: bool,
    quick: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Measure speed and memory under cache policies.

    The settings take turns, block by block, so that a machine that drifts slows all of them alike. `stock` is
    transformers without thinkkv.
    """
    start = time.monotonic()
    defaults: Mapping[str, Any] = QUICK if quick else {}
    options = Options(
        numbers(contexts or defaults.get("contexts", "1000,4000"), "--contexts", int),
        numbers(threads, "--threads", int) if threads else [0],
        new_tokens or defaults.get("new_tokens", 48),
        prefills or defaults.get("prefills", 3),
        quantize,
        native,
        dtype,
        not quick if memory is None else memory,
    )
    if native and runtime != "onnx":
        raise click.UsageError("--native is of ONNX bundles - add --runtime onnx")
    chosen = Compared.of(model, profile, policies or (POLICIES if runtime == "torch" else ONNX_POLICIES))
    ratios = numbers(ratio, "--ratio", float)
    rows = _onnx_rows if runtime == "onnx" else _torch_rows
    folder = chosen.folder("bench", out)
    from thinkkv.sdk.machine import described

    begun = described("thinkkv")  # a checkout may move on while a run lasts
    found = list(rows(chosen, ratios, options, folder))
    seconds = round(time.monotonic() - start, 1)
    _finish({"model": chosen.model, "rows": found, **begun, "seconds": seconds}, folder, as_json)


def _torch_rows(chosen: Compared, ratios: Sequence[float], options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of PyTorch, the model shared by all settings."""
    import torch

    from thinkkv.sdk.evaluation.setting import settings
    from thinkkv.sdk.speed.prompt import prompt_ids
    from thinkkv.sdk.speed.torch_contender import STOCK, TorchContender

    compared: list[Setting | None] = [None] if STOCK in chosen.policies else []
    compared += settings([name for name in chosen.policies if name != STOCK], ratios)
    network, tokenizer = chosen.load(options.dtype)
    _check(network, options)
    profiles = chosen.profiles(network, tokenizer, [one for one in compared if one], folder)
    kept = {policy: str(profile.save(folder / f"profile-{policy}")) for policy, profile in profiles.items()}
    usual = torch.get_num_threads()
    for threads in options.threads:
        torch.set_num_threads(threads or usual)
        for context in options.contexts:
            contenders = [
                TorchContender(network, one, profiles.get(one.policy.name) if one else None) for one in compared
            ]
            jobs = [
                {
                    "contender": "thinkkv.sdk.speed.torch_contender:of_job",
                    "model": chosen.model,
                    "dtype": options.dtype,
                    "policy": contender.policy,
                    "ratio": contender.ratio,
                    "profile": kept.get(one.policy.name) if one else None,
                }
                for contender, one in zip(contenders, compared, strict=True)
            ]
            yield from _rows(contenders, jobs, prompt_ids(tokenizer, context), threads, options)
    torch.set_num_threads(usual)


def _onnx_rows(chosen: Compared, ratios: Sequence[float], options: Options, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of ONNX Runtime, a bundle for each setting and context, exported into the folder where it is missing."""
    from thinkkv.export.onnx.builder import check_installed
    from thinkkv.export.onnx.compared import bundle, check_exported
    from thinkkv.export.onnx.contender import OnnxContender
    from thinkkv.sdk.evaluation.setting import settings
    from thinkkv.sdk.profile import fingerprint_of
    from thinkkv.sdk.speed.prompt import prompt_ids

    compared = settings(chosen.policies, ratios)
    check_exported(compared)
    check_installed()
    network, tokenizer = chosen.load(options.dtype)
    _check(network, options)
    profiles = chosen.profiles(network, tokenizer, compared, folder)
    fingerprint = fingerprint_of(network)
    for context in options.contexts:
        folders = []
        for setting in compared:
            with progress(f"bundle of {setting.name} {setting.ratio:g} for {context} tokens"):
                folders.append(
                    bundle(
                        lambda: chosen.load(options.dtype),
                        setting,
                        profiles.get(setting.policy.name),
                        label=Path(chosen.model).name,
                        fingerprint=fingerprint,
                        context=context,
                        quantize=options.quantize,
                        folder=folder / "bundles",
                    )
                )
        sides: list[dict[str, Any]] = [
            {"bundle": str(found), "name": setting.name, "native": native}
            for found, setting in zip(folders, compared, strict=True)
            for native in ((False, True) if options.native and setting.policy.name != "full" else (False,))
        ]
        for threads in options.threads:
            contenders = [OnnxContender(threads=threads or None, **side) for side in sides]
            jobs = [{"contender": "thinkkv.export.onnx.contender:of_job", **side} for side in sides]
            yield from _rows(contenders, jobs, prompt_ids(tokenizer, context), threads, options)


def _rows(
    contenders: Sequence[Contender],
    jobs: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    threads: int,
    options: Options,
) -> Iterator[dict[str, Any]]:
    """Measured rows of one prompt, with peak memory."""
    from thinkkv.sdk.speed.measure import measure
    from thinkkv.sdk.speed.peak import peak_rss

    label = f"{len(ids)} tokens" + (f", {threads} threads" if threads else "")
    rows = measure(
        contenders, ids, new_tokens=options.new_tokens, prefills=options.prefills, progress=track(f"{label}, turns")
    )
    shape = {"context": len(ids), "threads": threads or None}
    for row, job in zip(rows, jobs, strict=True):
        peak = None
        if options.memory:
            with progress(f"peak memory of {row['policy']} {row['ratio']:g}, {label}"):
                peak = peak_rss({**job, **shape})
        yield {**row, "threads": threads or None, "peak_rss_bytes": peak}


def _check(network: Any, options: Options) -> None:
    from thinkkv.sdk.speed.contender import check_context

    limit = getattr(network.config, "max_position_embeddings", None)
    check_context(limit, max(options.contexts), options.new_tokens)


def _finish(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    from thinkkv.sdk.files import write_whole
    from thinkkv.sdk.outputs import finish
    from thinkkv.sdk.speed.picture import draw_speed

    write_whole(folder / "speed.png", draw_speed(result["rows"], result["model"]))
    finish(folder, result)
    if as_json:
        print_json(result)
    _show(result["rows"], folder)


def _show(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """One table of everything."""
    speed = ("ratio", "context", "threads", "prefill\ns", "tokens\n/s", "ms a\nstep")
    table = settings_table("runtime", after=(*speed, "cache\nMiB", "used\nMiB", "peak\nMiB"))
    for row in rows:
        sizes = (row[name] for name in ("cache_bytes", "used_bytes", "peak_rss_bytes"))
        table.add_row(
            row["runtime"],
            row["policy"],
            f"{row['ratio']:g}",
            str(row["context"]),
            str(row["threads"] or "-"),
            f"{row['prefill_seconds']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            "{:.0f}-{:.0f}".format(*row["step_ms_p10_p90"]),
            *("-" if size is None else f"{size / 2**20:.1f}" for size in sizes),
        )
    console.print(table)
    console.print(f"rows and speed.png are in {folder}", highlight=False)
