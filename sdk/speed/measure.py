"""Contenders take turns, block by block, so that a machine that drifts slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from thinkkv.sdk.speed.contender import Contender

BLOCK = 6
"""Decode steps of one turn."""

WARM_UP = 2
"""Decode steps that do not count, after the last prefill."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def measure(
    contenders: Sequence[Contender],
    ids: Sequence[int],
    *,
    new_tokens: int,
    prefills: int,
    progress: Progress = iter,
) -> list[dict[str, Any]]:
    """Speed and bytes of every contender on one prompt.

    Args:
        contenders: in the order of their turns.
        ids: the prompt.
        new_tokens: decode steps that are timed.
        prefills: how often each contender reads the prompt.
        progress: wraps the turns.

    Returns:
        One row each; speeds are medians.
    """
    room = new_tokens + WARM_UP + 1
    latencies: list[list[float]] = [[] for _ in contenders]
    steps: list[list[float]] = [[] for _ in contenders]
    blocks = [min(BLOCK, new_tokens - at) for at in range(0, new_tokens, BLOCK)]
    for count in progress([0] * prefills + blocks):
        for contender, latency, step in zip(contenders, latencies, steps, strict=True):
            with contender.ready():
                if count == 0:
                    latency.append(_timed(lambda c=contender: c.prefill(ids, room)))  # type: ignore[misc]
                    continue
                for _ in range(0 if step else WARM_UP):
                    contender.step()
                step += [_timed(contender.step) for _ in range(count)]
    return [_row(*found, len(ids)) for found in zip(contenders, latencies, steps, strict=True)]


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _row(contender: Contender, latencies: Sequence[float], steps: Sequence[float], context: int) -> dict[str, Any]:
    deciles = statistics.quantiles(steps, n=10) if len(steps) > 1 else [steps[0]] * 9
    held = contender.held()
    return {
        "runtime": contender.runtime,
        "policy": contender.policy,
        "ratio": contender.ratio,
        "context": context,
        "prefill_seconds": round(statistics.median(latencies), 4),
        "prefill_seconds_range": [round(min(latencies), 4), round(max(latencies), 4)],
        "decode_tokens_per_second": round(1 / statistics.median(steps), 2),
        "step_ms_p10_p90": [round(1000 * deciles[0], 2), round(1000 * deciles[-1], 2)],
        "cache_bytes": held.physical,
        "used_bytes": held.used,
        "full_bytes": held.full,
        "new_tokens": len(steps),
    }
