"""Means over seeds with Student's intervals, also for several comparisons at once (Bonferroni)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

PIECES = 2000
"""Of Simpson's rule, over an angle: the error is far below what is shown."""


def interval(numbers: Sequence[float], *, comparisons: int = 1) -> tuple[float, float]:
    """Mean, and half width of its 95 % interval; NaN for a single number.

    Args:
        numbers: one per seed.
        comparisons: how many intervals are to hold all at once with 95 %.
    """
    if len(numbers) < 2:
        return numbers[0], math.nan
    quantile = student(1 - 0.025 / comparisons, len(numbers) - 1)
    return statistics.mean(numbers), quantile * statistics.stdev(numbers) / len(numbers) ** 0.5


def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t above the median.

    Args:
        probability: in (0.5, 1).
        freedom: degrees of it.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(50):  # bisection: the angle is t = sqrt(freedom) * tan(angle)
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _below(angle: float, freedom: int) -> float:
    """Student's distribution function: in the angle its density goes with cos(angle) ** (freedom - 1)."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    width = angle / PIECES
    ends = 1.0 + math.cos(angle) ** (freedom - 1)
    inner = sum((4 if at % 2 else 2) * math.cos(at * width) ** (freedom - 1) for at in range(1, PIECES))
    return 0.5 + scale * width / 3 * (ends + inner)
