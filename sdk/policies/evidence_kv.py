"""Evidence-KV: full heads by a profile, all other tokens by what this prompt's last queries attend to. Our own policy.

The full heads are those of ``retrieval-kv``, known before the prompt. What the other heads keep is decided by the
prompt itself: one ranking of their tokens over all heads and layers by the attention of the observation window, so
that a layer to which the question matters has more of them (AdaKV, arXiv:2407.11550, ranks within a layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView, pool
from thinkkv.sdk.policies.ranked_heads import keeps_whole, plans_where
from thinkkv.sdk.policies.ranked_tokens import keep_best
from thinkkv.sdk.policies.retrieval_kv import RetrievalKV


@dataclass(frozen=True)
class EvidenceKV(RetrievalKV):
    """Retrieval-KV whose other heads share their middle tokens as the prompt demands.

    Args:
        floor: share of an even head's middle tokens that every other head has for certain (AdaKV's safeguard).
        head_scores, share, sinks, recent, observation_window, pooling: as in Retrieval-KV.
    """

    name: ClassVar[str] = "evidence-kv"
    compares_layers: ClassVar[bool] = True

    floor: float = 0.2

    @property
    def held_queries(self) -> int:
        """The observation window, whose attention is asked for when all layers have read the prompt."""
        return self.observation_window

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """As if the model had this layer only."""
        return self.plan_model([prompt], [budget])[0]

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """Full heads, every other head's floor, and the best of all other tokens of all layers together."""
        scores = [self._scores(prompt) for prompt in prompts]
        certain = [self._certain(*layer) for layer in zip(prompts, budgets, scores, strict=True)]
        kept = keep_best(certain, scores, sum(budget.tokens for budget in budgets))
        return plans_where(kept, prompts, budgets, self.head_scores, self.share)

    def _scores(self, prompt: PromptView) -> torch.Tensor:
        """[n, N] float32: the window's attention to each token and its neighbours."""
        return pool(prompt.per_kv_head(prompt.window_scores(self.observation_window)), self.pooling)

    def _certain(self, prompt: PromptView, budget: LayerBudget, scores: torch.Tensor) -> torch.Tensor:
        """[n, N] bool: what is kept whatever other layers need."""
        if keeps_whole(prompt, budget):
            return torch.ones_like(scores, dtype=torch.bool)
        split = self.split(prompt, budget)
        ranked = scores.clone()
        ranked[:, : split.sinks] = ranked[:, prompt.tokens - split.recent :] = float("inf")
        best = ranked.topk(split.sinks + split.recent + int(self.floor * split.middle)).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        kept[list(budget.full_heads)] = True
        return kept
