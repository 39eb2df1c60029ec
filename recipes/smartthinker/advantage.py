"""S-GAE: generalized advantage estimation whose time steps are reasoning steps.

    delta_k = R_k - b + gamma * V_{k+1} - V_k,    A_k = delta_k + gamma * lambda * A_{k+1}

over the steps k of one response (the step form of StepPO, arXiv:2604.18401), then whitened and given to all tokens of
the step. SmartThinker (arXiv:2507.04348) names S-GAE and gives neither baseline nor constants. Our choices:

- critic-free: ``V = 0`` and ``b`` is the mean over the prompt's responses of their mean step reward, the differential
  form of average-reward learning. A constant V would reward every further step of positive reward; here a step gains
  only by being better than the prompt's average step, however many there are. Every response counts alike in b;
- whitening divides by the standard deviation over the prompt's steps (or the batch's) plus ``floor``. Nothing is
  subtracted again: b has centered the rewards already;
- with one step per response and lambda = 1 this is exactly the group-relative advantage ``(R - mean) / (std + floor)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Whitening = Literal["group", "batch", "none"]

Rewards = Sequence[Sequence[float]]
"""Step rewards of several responses."""


def baseline(group: Rewards) -> float:
    """Mean over responses of their mean step reward; 0 where no response has steps."""
    means = [sum(rewards) / len(rewards) for rewards in group if rewards]
    return sum(means) / len(means) if means else 0.0


def step_advantages(rewards: Sequence[float], mean: float, *, gamma: float, lam: float) -> list[float]:
    """S-GAE of one response before whitening.

    Args:
        rewards: of its steps.
        mean: baseline b.
        gamma: discount, in [0, 1].
        lam: how far a step answers for later ones, in [0, 1]; 0: only for itself.
    """
    found, following = [], 0.0
    for reward in reversed(rewards):
        following = reward - mean + gamma * lam * following
        found.append(following)
    return found[::-1]


def s_gae(
    groups: Sequence[Rewards],
    *,
    gamma: float = 1.0,
    lam: float = 0.5,
    whitening: Whitening = "group",
    floor: float = 0.1,
) -> list[list[list[float]]]:
    """Step advantages of a batch of prompts.

    Args:
        groups: per prompt, its responses' step rewards.
        gamma: discount.
        lam: trace decay.
        whitening: what the standard deviation is taken over.
        floor: added to it. Rewards lie in [-1, 1]; differences far below the floor are not blown up to unit size.

    Returns:
        Advantages in the shape of the rewards; all finite.
    """
    raw = [[step_advantages(rewards, baseline(group), gamma=gamma, lam=lam) for rewards in group] for group in groups]
    if whitening == "none":
        return raw
    shared = _deviation([rewards for group in groups for rewards in group])
    scales = [(_deviation(group) if whitening == "group" else shared) + floor for group in groups]
    return [
        [[value / scale if scale > 0 else 0.0 for value in values] for values in group]
        for group, scale in zip(raw, scales, strict=True)
    ]


def broadcast(values: Sequence[float], spans: Sequence[tuple[int, int]], length: int) -> list[float]:
    """Give each step's value to all its tokens; tokens outside every step get 0."""
    found = [0.0] * length
    for value, (start, end) in zip(values, spans, strict=True):
        found[start:end] = [value] * (end - start)
    return found


def _deviation(rewards: Rewards) -> float:
    """Sample standard deviation over steps, as torch and TRL compute it; 0 for fewer than two."""
    values = [value for row in rewards for value in row]
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
