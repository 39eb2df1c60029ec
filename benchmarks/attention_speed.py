"""What a cache costs on a CPU: attention over the rows held, beside moving the same bytes with torch alone.

    python benchmarks/attention_speed.py --out benchmarks/results/attention_speed.json

Attends to every layer's rows, alone and behind appending a token, as a decode step does; there are as many layers as in
the model, so no row is in the processor's cache. ``layouts`` compares rows of one, two and three lengths that hold the
same bytes, in turns with two yardsticks on the same memory: ``read`` sums all of it, ``copy`` writes half of it over
the other half. ``prefill`` times the policies' part of a prompt: window scores, separator and compaction.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from decode_speed import prompt_batch
from environment import save
from rich.console import Console
from rich.table import Table

from thinkkv import sdk
from thinkkv.kernels.arena import Arena
from thinkkv.kernels.dispatch import row_operations
from thinkkv.sdk.layer import HeterogeneousLayer
from thinkkv.sdk.plan import PromptView
from thinkkv.sdk.policies import task_kv

LAYERS, KV_HEADS, GROUP, DIM = 30, 3, 3, 64
"""SmolLM2-135M's."""

LAYOUTS: dict[str, tuple[float, ...]] = {
    "one length": (1.0, 1.0, 1.0),
    "two lengths": (2.0, 0.5, 0.5),
    "three lengths": (1.5, 1.0, 0.5),
}
"""Lengths of the three rows over their mean."""


def layer(lengths: list[int], dtype: torch.dtype) -> Arena:
    """One layer's rows, random."""
    alike = sorted(set(lengths), reverse=True)
    blocks = [([row for row, mine in enumerate(lengths) if mine == length], length) for length in alike]
    arena = Arena(blocks, spare=512, like=(torch.empty(0, DIM, dtype=dtype),) * 2)
    arena.keys.normal_()
    arena.values.normal_()
    return arena


def step(layers: list[Arena], dtype: torch.dtype, *, append: bool) -> Callable[[], None]:
    """Attend to all layers; before it append a token to each, if so said."""
    operations = row_operations("cpu")
    query = torch.randn(KV_HEADS, GROUP, 1, DIM, dtype=dtype)
    new = torch.randn(KV_HEADS, 1, DIM, dtype=dtype)

    def run() -> None:
        for arena in layers:
            if append:
                operations.append(arena, new, new)
                arena.lengthen(1, counted=operations.counting)
            operations.ragged_decode(arena, query, scale=DIM**-0.5)

    return run


def yardsticks(layers: list[Arena]) -> dict[str, Callable[[], None]]:
    """Ways to move all bytes of the layers with torch's threads: all of them read, or half read and half written."""
    memory = [rows.view(torch.float32) for arena in layers for rows in (arena.keys, arena.values)]
    half = len(memory) // 2

    def read() -> None:
        for rows in memory:
            rows.sum()

    def copy() -> None:
        for source, target in zip(memory[:half], memory[half:], strict=True):
            target.copy_(source)

    return {"read": read, "copy": copy}


def medians(runs: dict[Any, Callable[[], None]], turns: int) -> dict[Any, float]:
    """Median seconds of each, eight at a time in turns, after two turns to warm up."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for turn in range(turns + 2):
        for key, run in runs.items():
            for _ in range(8):
                start = time.perf_counter()
                run()
                if turn >= 2:
                    times[key].append(time.perf_counter() - start)
    return {key: statistics.median(taken) for key, taken in times.items()}


@torch.inference_mode()
def layouts(dtype: torch.dtype, tokens: int, turns: int) -> list[dict[str, Any]]:
    """Rows of the table: every layout at ``tokens`` held per row on average, in turns."""
    runs = {
        name: [layer([int(tokens * share) for share in shares], dtype) for _ in range(LAYERS)]
        for name, shares in LAYOUTS.items()
    }
    steps: dict[tuple[str, Any], Callable[[], None]] = {
        (name, append): step(runs[name], dtype, append=append) for append in (False, True) for name in runs
    }
    moves = {(name, way): run for name, layers in runs.items() for way, run in yardsticks(layers).items()}
    taken = medians({**steps, **moves}, turns)
    rows = []
    for name, layers in runs.items():
        held = sum(arena.used for arena in layers) * DIM * dtype.itemsize * 2
        attend, both = taken[name, False], taken[name, True]
        filled = held / sum(arena.keys.nbytes + arena.values.nbytes for arena in layers)
        copy, read = (taken[name, way] * filled for way in ("copy", "read"))
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "tokens_per_row": tokens,
                "layout": name,
                "held_bytes": held,
                "copy_ms": round(1000 * copy, 3),
                "read_ms": round(1000 * read, 3),
                "attend_ms": round(1000 * attend, 3),
                "attend_over_copy": round(attend / copy, 2),
                "attend_over_read": round(attend / read, 2),
                "with_append_ms": round(1000 * both, 3),
                "with_append_over_copy": round(both / copy, 2),
                "over_two_lengths": round(both / taken["two lengths", True], 2),
            }
        )
    return rows


PARTS = {
    "all": (HeterogeneousLayer, "compact"),
    "window scores": (PromptView, "window_scores"),
    "separator": (task_kv, "head_distances"),
}
"""What is timed of a prompt: all that is not stock, and two parts of it."""


@contextmanager
def stopwatches() -> Iterator[Counter[str]]:
    """Seconds spent in each of the parts."""
    spent: Counter[str] = Counter()

    def timed(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = whole(*args, **named)
            spent[name] += time.perf_counter() - start
            return found

        return run

    with ExitStack() as patches:
        for name, (owner, attribute) in PARTS.items():
            patches.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield spent


@torch.inference_mode()
def prefill(dtype: str, context: int, turns: int) -> list[dict[str, Any]]:
    """What share of a prompt's time goes to choosing and moving what is kept."""
    model, tokenizer = sdk.load("smollm2-135m", dtype=dtype)
    ids = prompt_batch(tokenizer, context, 1)
    rows = []
    for policy in ("full", "task-kv"):
        shares: dict[str, list[float]] = {name: [] for name in PARTS}
        seconds = []
        for _ in range(turns):
            with sdk.apply(model, policy=policy, ratio=0.25), stopwatches() as spent:
                start = time.perf_counter()
                model(ids, logits_to_keep=1)
                seconds.append(time.perf_counter() - start)
            for name in PARTS:
                shares[name].append(spent[name] / seconds[-1])
        rows.append(
            {
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "context": context,
                "policy": policy,
                "prefill_seconds": round(statistics.median(seconds), 2),
                "share_of_prefill": {name: round(statistics.median(found), 4) for name, found in shares.items()},
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0])
    for entry in rows:
        table.add_row(*(str(value) for value in entry.values()))
    Console(stderr=True, width=160).print(table)


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", default="500,2000,8000", help="held per row on average; empty leaves it out")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=8000, help="tokens of the prompt; 0 leaves it out")
    parser.add_argument("--prefills", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"layouts": [], "prefill": []}
    for threads in (int(text) for text in arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in arguments.dtypes.split(","):
            for tokens in (int(text) for text in arguments.tokens.split(",") if text):
                found["layouts"] += layouts(getattr(torch, dtype), tokens, arguments.turns)
                show(found["layouts"][-len(LAYOUTS) :])
    if arguments.prefill:
        for dtype in arguments.dtypes.split(","):
            found["prefill"] += prefill(dtype, arguments.prefill, arguments.prefills)
        show(found["prefill"])
    if arguments.out:
        save(arguments.out, found)


if __name__ == "__main__":
    main()
