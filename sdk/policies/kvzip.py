"""KVzip: keep what the model looks up when it reads the prompt a second time (arXiv:2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.ranked_tokens import keep_best
from thinkkv.sdk.policies.rehearsing import Rehearsing


@dataclass(frozen=True)
class KVzip(Rehearsing):
    """One ranking of all tokens in all KV heads and layers by their most attention in a rehearsal.

    The prompt of the paper that asks for a repetition is left out, since a cache knows no words: the text alone is
    read again (``sdk/rehearsal.py``). What is kept is really stored, every head with a length of its own.

    Args:
        sinks, recent: tokens at both ends that every head keeps; ours, the paper keeps a system prompt.
        whole: prompts of up to so many tokens are kept whole.
    """

    name: ClassVar[str] = "kvzip"

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """As if the model had this layer only."""
        return self.plan_model([prompt], [budget])[0]

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """The best tokens of all layers together; layers that are to be kept whole come first."""
        scores = [self._scores(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=True)]
        none = [torch.zeros_like(layer, dtype=torch.bool) for layer in scores]
        kept = keep_best(none, scores, sum(budget.tokens for budget in budgets))
        return [KeepPlan.where(layer) for layer in kept]

    def _scores(self, prompt: PromptView, budget: LayerBudget) -> torch.Tensor:
        """[n, N] float32: how much each token was attended to, infinitely where it is kept for certain."""
        if budget.tokens >= prompt.tokens * prompt.kv_heads:
            return torch.full(prompt.keys.shape[:2], float("inf"), device=prompt.keys.device)
        return self.with_ends(prompt, self.rehearsed(prompt))
