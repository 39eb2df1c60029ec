"""Prefill and decode speed of a patched model beside stock transformers, in one run.

    python benchmarks/decode_speed.py --contexts 128,2000,8000 --out benchmarks/results/decode_speed.json

The compared settings take turns block by block, so that a machine that drifts hits all alike; medians are reported,
and ratios to stock from the same run. ``--memory`` measures peak memory instead, each setting in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from thinkkv import sdk
from thinkkv.sdk.speed.peak import own_peak
from thinkkv.sdk.speed.prompt import prompt_ids

STEPS_PER_TURN = 6


@dataclass(frozen=True)
class Setting:
    """One thing to measure: stock transformers (policy None) or a policy at a ratio, its steps compiled or not."""

    policy: str | None
    ratio: float = 1.0
    compiled: bool = False

    @classmethod
    def named(cls, text: str, ratio: float) -> Setting:
        """From ``policy`` or ``policy+compiled``."""
        policy, _, compiled = text.partition("+")
        return cls(policy, 1.0 if policy == "full" else ratio, compiled == "compiled")

    def __str__(self) -> str:
        name = "stock" if self.policy is None else f"{self.policy}-{self.ratio:g}"
        return name + "+compiled" * self.compiled

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """Patch the model for this setting; yields a function that makes an empty cache."""
        if self.policy is None:
            yield lambda: DynamicCache(config=model.config)
            return
        with sdk.apply(model, policy=self.policy, ratio=self.ratio, compiled=self.compiled) as handle:
            yield handle.new_cache


@dataclass
class Run:
    """One setting while it is measured."""

    setting: Setting
    cache: Any = None
    token: Any = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def prompt_batch(tokenizer: Any, context: int, batch: int) -> torch.Tensor:
    """[batch, context] token ids of the project's own prompt texts."""
    return torch.tensor([prompt_ids(tokenizer, context)] * batch)


@torch.inference_mode()
def prefill(model: Any, run: Run, ids: torch.Tensor) -> None:
    """Fill a new cache with the prompt, timed."""
    with run.setting.on(model) as new_cache:
        run.cache = None
        run.cache = new_cache()
        start = time.perf_counter()
        out = model(ids, past_key_values=run.cache, use_cache=True, logits_to_keep=1)
        run.prefill.append(time.perf_counter() - start)
        run.token = out.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def decode(model: Any, run: Run, steps: int, *, timed: bool = True) -> None:
    """Decode greedily on the run's cache, each step timed."""
    with run.setting.on(model):
        for _ in range(steps):
            start = time.perf_counter()
            out = model(run.token, past_key_values=run.cache, use_cache=True)
            run.token = out.logits[:, -1:].argmax(-1)
            if timed:
                run.decode.append(time.perf_counter() - start)


def cache_bytes(cache: Any) -> int:
    """Bytes of storage that a cache has allocated."""
    if isinstance(cache, sdk.HeterogeneousCache):
        return sum(layer.store.arena.nbytes for layer in cache.layers)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure(model: Any, ids: torch.Tensor, settings: list[Setting], turns: int, prefills: int) -> list[dict[str, Any]]:
    """Rows of one context and batch."""
    runs = [Run(setting) for setting in settings]
    for _ in range(prefills):
        for run in runs:
            prefill(model, run, ids)
    for run in runs:
        decode(model, run, 2, timed=False)
    for _ in range(turns):
        for run in runs:
            decode(model, run, STEPS_PER_TURN)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    bandwidth = copy_bandwidth()
    return [row(run, runs[0], ids, weights, bandwidth) for run in runs]


def copy_bandwidth() -> float:
    """Bytes that this machine reads and writes a second when it copies 200 MB with torch's threads; the best of 9."""
    source = torch.ones(50_000_000)
    target = torch.empty_like(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def row(run: Run, stock: Run, ids: torch.Tensor, weights: int, bandwidth: float) -> dict[str, Any]:
    """One result as JSON values; speeds are medians, ``bound`` is that of reading all weights and the cache once."""
    step, stock_step = statistics.median(run.decode), statistics.median(stock.decode)
    deciles = statistics.quantiles(run.decode, n=10)
    return {
        "setting": str(run.setting),
        "batch": ids.shape[0],
        "context": ids.shape[1],
        "prefill_seconds": round(statistics.median(run.prefill), 3),
        "prefill_vs_stock": round(statistics.median(run.prefill) / statistics.median(stock.prefill), 3),
        "decode_tokens_per_second": round(ids.shape[0] / step, 2),
        "decode_vs_stock": round(stock_step / step, 3),
        "step_ms_p10_p90": [round(1000 * deciles[0], 2), round(1000 * deciles[-1], 2)],
        "bound_tokens_per_second": round(ids.shape[0] * bandwidth / (weights + cache_bytes(run.cache)), 2),
        "cache_bytes": cache_bytes(run.cache),
    }


def peak_memory(arguments: argparse.Namespace, setting: Setting, dtype: str, context: int, batch: int) -> int:
    """Peak resident bytes of a process that prefills and decodes a little under one setting."""
    command = [
        sys.executable,
        __file__,
        "--model",
        arguments.model,
        "--child",
        str(setting.policy),
        str(setting.ratio),
    ]
    command += ["--dtypes", dtype, "--contexts", str(context), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def child(arguments: argparse.Namespace) -> None:
    """The process that ``peak_memory`` starts."""
    policy, ratio = arguments.child
    model, tokenizer = sdk.load(arguments.model, dtype=arguments.dtypes)
    run = Run(Setting(None if policy == "None" else policy, float(ratio)))
    prefill(model, run, prompt_batch(tokenizer, int(arguments.contexts), arguments.batch))
    decode(model, run, 4)
    print(own_peak())


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0])
    for entry in rows:
        table.add_row(*(str(value) for value in entry.values()))
    Console(stderr=True, width=200).print(table)


def main() -> None:
    """Measure what the command line asks for and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--contexts", default="128,2000,8000")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--policies", default="full,task-kv", help="with +compiled where steps are to be compiled")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--turns", type=int, default=8, help=f"blocks of {STEPS_PER_TURN} decode steps per setting")
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads; default: one per core")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(arguments)
        return
    settings = [Setting(None)] + [Setting.named(text, arguments.ratio) for text in arguments.policies.split(",")]
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes.split(","):
        model, tokenizer = (None, None) if arguments.memory else sdk.load(arguments.model, dtype=dtype)
        for context in (int(text) for text in arguments.contexts.split(",")):
            if arguments.memory:
                shape = {"batch": arguments.batch, "context": context}
                found = [
                    {
                        "setting": str(s),
                        **shape,
                        "peak_rss_bytes": peak_memory(arguments, s, dtype, context, arguments.batch),
                    }
                    for s in settings
                ]
            else:
                ids = prompt_batch(tokenizer, context, arguments.batch)
                found = measure(model, ids, settings, arguments.turns, arguments.prefills)
            rows += [{"model": arguments.model, "dtype": dtype, **entry} for entry in found]
            show(rows[-len(found) :])
    if arguments.out:
        save(arguments.out, {"rows": rows})


if __name__ == "__main__":
    main()
