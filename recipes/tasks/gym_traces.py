"""Verbose right traces for problems of reasoning-gym, so that a model that does not reason yet can learn to.

Each writes the needed steps one by one and adds redundant ones that recheck, restate or hesitate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

REDUNDANCY = 0.5
"""Probability that a further redundant step follows, after every step."""


def chain_sum(entry: Mapping[str, Any], rng: random.Random) -> str:
    """Additions and subtractions from left to right, one a step."""
    first, *rest = entry["metadata"]["expression"].split()
    value, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before = value
        value += int(term) if sign == "+" else -int(term)
        equation = f"{before} {sign} {term} = {value}"
        steps.append(f"{equation}.")
        while rng.random() < REDUNDANCY:
            steps.append(
                rng.choice(
                    (
                        f"Wait, let me check that again: {equation}. Yes, that is right.",
                        f"So the result so far is {value}.",
                        "Hmm, let me think about what to do next.",
                    )
                )
            )
    return "<think>\n" + "\n\n".join(steps) + f"\n</think>\n{value}"


TRACERS: Mapping[str, Callable[[Mapping[str, Any], random.Random], str]] = {"chain_sum": chain_sum}
"""By the name of the data set."""
