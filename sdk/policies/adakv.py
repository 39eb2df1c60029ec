"""AdaKV: SnapKV whose layer budget is shared by the heads as their votes demand (arXiv:2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.snapkv import SnapKV, voted, with_window


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """One ranking of votes over all heads of a layer, with a floor for every head.

    Args:
        floor: share of an even head's voted tokens that every head has for certain (the paper's safeguard).
    """

    name: ClassVar[str] = "adakv"

    floor: float = 0.2

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Window plus the tokens that win in the layer-wide ranking."""
        if budget.tokens >= prompt.tokens * prompt.kv_heads:
            return KeepPlan.everything(prompt)
        votes = voted(prompt, self.observation_window, self.pooling)
        counts = self._head_counts(votes, budget.tokens - self.observation_window * prompt.kv_heads)
        kept = (row.topk(count).indices for row, count in zip(votes, counts, strict=True))
        return KeepPlan(kept=tuple(with_window(prompt, positions, self.observation_window) for positions in kept))

    def _head_counts(self, votes: torch.Tensor, voted_tokens: int) -> list[int]:
        """Voted tokens per head; they sum to at most ``voted_tokens``."""
        heads, candidates = votes.shape
        even = voted_tokens // heads
        winners = votes.flatten().topk(min(even * heads, votes.numel())).indices // candidates
        won = torch.bincount(winners, minlength=heads).tolist()
        return [min(candidates, int((1 - self.floor) * count + self.floor * even)) for count in won]
