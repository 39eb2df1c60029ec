"""The step-level length-control reward, and the global length penalty that it is compared with.

The form of the paper (arXiv:2507.04348, as reprinted by arXiv:2503.21614) for step j of a response of n steps:

    right answer:  r_j = (1 - k1 * sigmoid(l_j)) * (1 - k2 * sigmoid(n))
    wrong answer:  r_j = -exp(-rho * d_j / k0)

Our choices, where the source is silent:

- ``l_j`` and ``n`` are z-scores over the prompt's right responses (over all their steps, and over their numbers of
  steps); a spread of zero gives 0, hence sigmoid = 1/2;
- importance spares: ``k1`` and ``k2`` are multiplied by ``1 - w_j``, w_j in [0, 1] the step's weight, so that a
  critical step keeps r = 1 at any length and a redundant one bears the whole factor;
- ``d_j`` = steps between j and the end, ``k0 = n``: the blame for a wrong answer is largest where it was given;
- rewards are dimensionless, in (0, 1] or [-1, 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepReward:
    """Strengths of the step reward.

    Args:
        k1: of a step's length, in [0, 1].
        k2: of the number of steps, in [0, 1].
        rho: how fast the blame for a wrong answer fades towards the first step.
    """

    k1: float = 0.9
    k2: float = 0.3
    rho: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.k1 <= 1 and 0 <= self.k2 <= 1 and self.rho >= 0):
            raise ValueError("k1 and k2 must lie in [0, 1], rho must not be negative")


@dataclass(frozen=True)
class Rollout:
    """One response as the reward sees it.

    Args:
        lengths: tokens of each step.
        right: whether the answer is right.
        weights: importance weight of each step, in [0, 1].
    """

    lengths: tuple[int, ...]
    right: bool
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.weights):
            raise ValueError(f"{len(self.lengths)} steps but {len(self.weights)} weights")


def step_rewards(group: Sequence[Rollout], settings: StepReward) -> list[list[float]]:
    """Reward of every step of one prompt's responses.

    Args:
        group: the prompt's responses; a response without steps gets an empty list.
        settings: the strengths.

    Returns:
        One list per response, one value per step.
    """
    right = [rollout for rollout in group if rollout.right]
    lengths = Spread.of([length for rollout in right for length in rollout.lengths])
    counts = Spread.of([len(rollout.lengths) for rollout in right])
    return [
        _right(rollout, lengths, counts, settings) if rollout.right else _wrong(len(rollout.lengths), settings)
        for rollout in group
    ]


def global_penalty(lengths: Sequence[int], right: Sequence[bool], alpha: float) -> list[float]:
    """The penalty of Arora and Zanette (arXiv:2502.04463): ``1{right} * (1 - alpha * sigmoid(z))`` per response.

    Args:
        lengths: tokens of each of one prompt's responses.
        right: which are right.
        alpha: strength, in [0, 1).

    Returns:
        Rewards; z is the length's z-score over the right responses.
    """
    spread = Spread.of([length for length, ok in zip(lengths, right, strict=True) if ok])
    return [
        1 - alpha * sigmoid(spread.normalised(length)) if ok else 0.0 for length, ok in zip(lengths, right, strict=True)
    ]


@dataclass(frozen=True)
class Spread:
    """Mean and population standard deviation of a normaliser."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Those of some values; of none, the standard ones."""
        if not values:
            return cls(0.0, 0.0)
        mean = sum(values) / len(values)
        return cls(mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))

    def normalised(self, value: float) -> float:
        """The z-score; 0 where there is no spread."""
        return (value - self.mean) / self.std if self.std > 1e-9 else 0.0


def sigmoid(value: float) -> float:
    """Logistic function, safe for any size."""
    if value >= 0:
        return 1 / (1 + math.exp(-min(value, 700.0)))
    return 1 - sigmoid(-value)


def _right(rollout: Rollout, lengths: Spread, counts: Spread, settings: StepReward) -> list[float]:
    count_factor = settings.k2 * sigmoid(counts.normalised(len(rollout.lengths)))
    return [
        (1 - (1 - weight) * settings.k1 * sigmoid(lengths.normalised(length))) * (1 - (1 - weight) * count_factor)
        for length, weight in zip(rollout.lengths, rollout.weights, strict=True)
    ]


def _wrong(steps: int, settings: StepReward) -> list[float]:
    return [-math.exp(-settings.rho * (steps - 1 - index) / steps) for index in range(steps)]
