"""Reread-KV: full heads by a profile, all other tokens by what a second reading looks up. Our own policy.

``kvzip`` ranks tokens by their sharpest look-up alone, so a token that one query needs displaces one that a hundred
need a little; by the sum alone it is the other way round. Here the rank is the geometric mean of the two. Of all
attention that a token gets, as one vector over the queries, that is an upper bound of the Euclidean length (Hoelder's
inequality): of how far it moves all outputs together when it is evicted, values apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.ranked_heads import HeadScores, check_ranking, keeps_whole, plans_where, with_full_heads
from thinkkv.sdk.policies.ranked_tokens import keep_best
from thinkkv.sdk.policies.rehearsing import Rehearsing


@dataclass(frozen=True)
class RereadKV(Rehearsing):
    """The best heads of a profile keep everything; of all others, over heads and layers, the tokens most read again.

    Args:
        head_scores: [layers][KV heads], higher keeps more; from a profile, as for ``retrieval-kv``.
        share: of all KV heads of the model that keep everything; lowered where the budget forces it.
        sinks, recent: tokens at both ends that every head keeps.
        whole: prompts of up to so many tokens are kept whole.
    """

    name: ClassVar[str] = "reread-kv"
    profile_score: ClassVar[str] = "retrieval"

    head_scores: HeadScores = ()
    share: float = 0.1

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """As many of the best heads as fit are full; the plan may spread the rest over all others."""
        check_ranking(self.name, self.head_scores)
        return with_full_heads(self.head_scores, self.share, layers, budget, least=self.smallest)

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """As if the model had this layer only."""
        return self.plan_model([prompt], [budget])[0]

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """Full heads, both ends of every head, and the best of all other tokens of all layers together."""
        certain = [self._certain(*layer) for layer in zip(prompts, budgets, strict=True)]
        scores = [self._scores(prompt, mine) for prompt, mine in zip(prompts, certain, strict=True)]
        kept = keep_best(certain, scores, sum(budget.tokens for budget in budgets))
        return plans_where(kept, prompts, budgets, self.head_scores, self.share)

    def _certain(self, prompt: PromptView, budget: LayerBudget) -> torch.Tensor:
        """[n, N] bool: what is kept whatever it is ranked."""
        whole = keeps_whole(prompt, budget)
        kept = torch.full(prompt.keys.shape[:2], whole, device=prompt.keys.device)
        kept[:, : self.sinks] = kept[:, prompt.tokens - self.recent :] = True
        kept[list(budget.full_heads)] = True
        return kept

    def _scores(self, prompt: PromptView, certain: torch.Tensor) -> torch.Tensor:
        """[n, N] float32, for tokens that are not kept already; short prompts are not read again."""
        if certain.all():
            return torch.zeros(certain.shape, device=certain.device)
        return (self.rehearsed(prompt) * self.rehearsed_sum(prompt)).sqrt()
