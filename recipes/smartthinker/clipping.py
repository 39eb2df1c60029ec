"""Difficulty-adaptive clipping: a rare right answer may move the policy further than a common one.

    eps_high = eps_low + (eps_max - eps_low) * (k - c) / (k - 1)    for right responses, c right out of k
    eps_high = eps_low                                              for wrong ones

SmartThinker (arXiv:2507.04348) names the strategy and gives no law; this is GAPO's (arXiv:2609.00444) with the bounds
of DAPO (.2, .28). Bounds are on the importance ratio, dimensionless. They are inert while every sample is used for one
update only: the recipe is refused then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ClipRange:
    """Bounds of the importance ratio.

    Args:
        low: below 1, for all responses.
        high: above 1, at most.
    """

    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        if not 0 < self.low < 1 or self.high < self.low:
            raise ValueError("clipping needs 0 < low < 1 and high >= low")


def upper_bounds(right: Sequence[bool], clip: ClipRange) -> list[float]:
    """Upper bound of each of one prompt's responses.

    Args:
        right: which are right.
        clip: the range; with a single response it stays at ``low``.
    """
    k, c = len(right), sum(right)
    if k < 2:
        return [clip.low] * k
    raised = clip.low + (clip.high - clip.low) * (k - c) / (k - 1)
    return [raised if ok else clip.low for ok in right]
