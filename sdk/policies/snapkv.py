"""SnapKV: keep the observation window and the tokens that it attends to most (arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView, best, pool
from thinkkv.sdk.policies.policy import Policy


@dataclass(frozen=True)
class SnapKV(Policy):
    """The same number of tokens for every KV head, chosen per head.

    Scores of query heads that share a KV head are averaged: the original caches query heads and has no such case.

    Args:
        observation_window: last queries whose attention votes; their own tokens are always kept.
        pooling: width of the average over neighbouring votes.
    """

    name: ClassVar[str] = "snapkv"

    observation_window: int = 32
    pooling: int = 7

    @property
    def smallest(self) -> int:
        """The observation window and one voted token."""
        return self.observation_window + 1

    @property
    def pooling_width(self) -> int:
        """As for the prompt's votes."""
        return self.pooling

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Window plus best voted tokens."""
        each = budget.tokens // prompt.kv_heads
        if each >= prompt.tokens:
            return KeepPlan.everything(prompt)
        votes = voted(prompt, self.observation_window, self.pooling)
        chosen = best(votes, each - self.observation_window)
        return KeepPlan(kept=tuple(with_window(prompt, row, self.observation_window) for row in chosen))


def voted(prompt: PromptView, observation_window: int, pooling: int) -> torch.Tensor:
    """[n, N - L] pooled votes of the window for every token before it, per KV head."""
    scores = prompt.per_kv_head(prompt.window_scores(observation_window))
    return pool(scores[:, : prompt.tokens - observation_window], pooling)


def with_window(prompt: PromptView, positions: torch.Tensor, observation_window: int) -> torch.Tensor:
    """``positions`` in ascending order, followed by the window's own."""
    window = torch.arange(prompt.tokens - observation_window, prompt.tokens, device=positions.device)
    return torch.cat([positions.sort().values, window])
