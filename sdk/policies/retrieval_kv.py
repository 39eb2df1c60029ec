"""Retrieval-KV: the KV heads that look things up keep everything. Our own policy, not a paper's.

A profile calibrated with ``--score retrieval`` ranks all KV heads of the model by how much answers about hidden facts
need them (``sdk/elimination.py``; that a few heads retrieve is the idea of DuoAttention, HeadKV and RazorAttention).
The best share of them, over all layers at once, keeps the whole cache; the others keep what Task-KV's others keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.ranked_heads import (
    SHARE,
    HeadScores,
    check_ranking,
    full_heads,
    keeps_whole,
    with_full_heads,
)
from thinkkv.sdk.policies.sinks_middle_recent import SinksMiddleRecent, Split

WINDOWS = 8
"""A prompt of so many observation windows behind its sinks is kept whole: with the defaults as short a one as Task-KV
keeps whole. It is few bytes, and a small ratio would leave less than the policy can work with."""


@dataclass(frozen=True)
class RetrievalKV(SinksMiddleRecent):
    """Full cache for the best retrieval heads of the whole model.

    Args:
        head_scores: [layers][KV heads] calibrated scores, higher keeps more; from a profile.
        share: share of all KV heads that keep everything; lowered where the budget forces it.
        sinks, recent, observation_window, pooling: as in Task-KV, for the other heads; fewer recent tokens, which
            leaves small budgets to the full heads.
    """

    name: ClassVar[str] = "retrieval-kv"
    profile_score: ClassVar[str] = "retrieval"

    head_scores: HeadScores = ()
    share: float = SHARE
    recent: int = 32

    @property
    def always_kept(self) -> int:
        """Sinks, and recent tokens or some observation windows, whichever are more."""
        return self.sinks + max(self.recent, WINDOWS * self.observation_window)

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """As many of the best heads as fit are full; every other head of the model gets the same tokens."""
        check_ranking(self.name, self.head_scores)
        return with_full_heads(self.head_scores, self.share, layers, budget, least=self.sinks + self.recent)

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Keep everything in the budget's full heads, sinks + middle + recent in the others."""
        full = full_heads(self.head_scores, self.share, prompt, budget)
        scores = torch.tensor(self.head_scores[prompt.layer])
        if keeps_whole(prompt, budget):
            return KeepPlan.everything(prompt, heterogeneous=full, head_scores=scores)
        window = prompt.per_kv_head(prompt.window_scores(self.observation_window))
        kept = self.keep(prompt, full, self.split(prompt, budget), window)
        return KeepPlan(kept=kept, heterogeneous=full, head_scores=scores)

    def split(self, prompt: PromptView, budget: LayerBudget) -> Split:
        """What each of the other heads keeps of a layer that is not kept whole."""
        full = len(budget.full_heads)
        return self.split_of(full, (budget.tokens - full * prompt.tokens) // (prompt.kv_heads - full))
