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

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.ranked_heads import SHARE, HeadScores, best_heads, check_ranking, ranked
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
        total = sum(layer.tokens for layer in even_layers(layers, budget))
        visible = {layer.layer: layer.visible for layer in layers}
        ranking = ranked(self.head_scores, (layer.layer for layer in layers))
        for count in range(round(self.share * len(ranking)), -1, -1):
            full = ranking[:count]
            left = total - sum(visible[layer] for layer, _ in full)
            each = _level([visible[layer] for layer, _ in ranking[count:]], left)
            if each >= self.sinks + self.recent:
                break
        return [self._layer(layer, each, tuple(sorted(h for at, h in full if at == layer.layer))) for layer in layers]

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Keep everything in the budget's full heads, sinks + middle + recent in the others."""
        full, scores = self.full_heads(prompt, budget), torch.tensor(self.head_scores[prompt.layer])
        if self.keeps_whole(prompt, budget):
            return KeepPlan.everything(prompt, heterogeneous=full, head_scores=scores)
        window = prompt.per_kv_head(prompt.window_scores(self.observation_window))
        kept = self.keep(prompt, full, self.split(prompt, budget), window)
        return KeepPlan(kept=kept, heterogeneous=full, head_scores=scores)

    def keeps_whole(self, prompt: PromptView, budget: LayerBudget) -> bool:
        """Whether nothing of this layer is evicted."""
        return budget.tokens >= prompt.tokens * prompt.kv_heads

    def full_heads(self, prompt: PromptView, budget: LayerBudget) -> tuple[int, ...]:
        """Those of the budget; where nothing is evicted, those that would keep everything."""
        whole = self.keeps_whole(prompt, budget)
        return best_heads(self.head_scores, self.share)[prompt.layer] if whole else budget.full_heads

    def split(self, prompt: PromptView, budget: LayerBudget) -> Split:
        """What each of the other heads keeps of a layer that is not kept whole."""
        full = len(budget.full_heads)
        return self.split_of(full, (budget.tokens - full * prompt.tokens) // (prompt.kv_heads - full))

    @staticmethod
    def _layer(layer: LayerPrompt, each: int, full: tuple[int, ...]) -> LayerBudget:
        others = layer.kv_heads - len(full)
        return LayerBudget(len(full) * layer.visible + others * min(each, layer.visible), full)


def _level(visible: Sequence[int], tokens: int) -> int:
    """Tokens per head if what heads of short layers cannot use goes to those of long ones."""
    rest = sorted(visible)
    while rest and tokens // len(rest) >= rest[0]:
        tokens -= rest.pop(0)
    return tokens // len(rest) if rest else max(visible, default=tokens)
