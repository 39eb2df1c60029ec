"""Rejection sampling, the first half of SmartThinker's stage 1: sample, score, keep the shortest right response.

Samples are appended to a file batch by batch, each batch seeded by its place, so that a killed run goes on with the
next batch and ends with the same samples.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinkkv.recipes.rewards import RIGHT_ABOVE
from thinkkv.sdk.files import write_whole


@dataclass(frozen=True)
class Sample:
    """One scored response.

    Args:
        index: of its prompt.
        prompt: rendered.
        ids: tokens, the end token included where there is one.
        text: without it.
        score: first reward.
    """

    index: int
    prompt: str
    ids: tuple[int, ...]
    text: str
    score: float


def read_samples(path: Path) -> list[Sample]:
    """What a file of samples holds; a half line at its end is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        found.append(Sample(**{**values, "ids": tuple(values["ids"])}))
    return found


def sample_in_batches(
    path: Path,
    rows: Sequence[tuple[int, dict[str, Any]]],
    *,
    samples: int,
    prompts_per_batch: int,
    draw: Callable[[Sequence[tuple[int, dict[str, Any]]], int], list[Sample]],
    done: Callable[[int, list[Sample], float | None], None],
) -> list[Sample]:
    """Sample all prompts, skipping the batches that the file holds already.

    Args:
        path: file of samples; it grows by whole batches.
        rows: indices and rows of the prompts.
        samples: responses per prompt.
        prompts_per_batch: how many prompts are sampled at once.
        draw: samples one batch of rows ``samples`` times, given the batch's first index as seed.
        done: told the number, the samples and the seconds of every batch in turn, also of those that the file holds:
            they have no seconds.
    """
    chunks = [rows[begin : begin + prompts_per_batch] for begin in range(0, len(rows), prompts_per_batch)]
    known = read_samples(path)
    counts: dict[int, int] = {}
    for item in known:
        counts[item.index] = counts.get(item.index, 0) + 1
    complete = [chunk for chunk in chunks if all(counts.get(index, 0) == samples for index, _ in chunk)]
    kept_indices = {index for chunk in complete for index, _ in chunk}
    found = [item for item in known if item.index in kept_indices]
    write_whole(path, _lines(found))
    for number, chunk in enumerate(chunks, 1):
        indices, seconds = {index for index, _ in chunk}, None
        if chunk in complete:
            new = [item for item in known if item.index in indices]
        else:
            start = time.monotonic()
            new = draw(chunk, chunk[0][0])
            seconds = time.monotonic() - start
            with path.open("ab") as file:
                file.write(_lines(new))
                file.flush()
                os.fsync(file.fileno())
            found += new
        done(number, new, seconds)
    return found


def select(samples: Iterable[Sample], *, keep: str, per_prompt: int, seed: int) -> list[Sample]:
    """The right responses to learn from, without duplicates.

    Args:
        samples: of all prompts.
        keep: ``shortest`` by tokens (ties: the first), or ``random``.
        per_prompt: at most so many of each prompt; prompts without a right response give none.
        seed: of the random choice.
    """
    by_prompt: dict[int, dict[tuple[int, ...], Sample]] = {}
    for item in samples:
        if item.score > RIGHT_ABOVE:
            by_prompt.setdefault(item.index, {}).setdefault(item.ids, item)
    found, seen = [], set()
    for index in sorted(by_prompt):
        right = list(by_prompt[index].values())
        if keep == "shortest":
            right.sort(key=lambda item: len(item.ids))
        else:
            random.Random(seed * 1_000_003 + index).shuffle(right)
        for item in right[:per_prompt]:
            # Equal problems under different indices are duplicates as well.
            if (item.prompt, item.ids) not in seen:
                seen.add((item.prompt, item.ids))
                found.append(item)
    return found


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write a file of samples whole."""
    write_whole(path, _lines(samples))


def _lines(samples: Iterable[Sample]) -> bytes:
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in samples).encode()
