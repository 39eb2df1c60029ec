"""Rehearsed-KV: most tokens by the rank of their head, the rest by what a second reading uses. Ours, not a paper's.

A number is found by a few heads, at tokens that one query looks up sharply; prose and counts need many heads, and
tokens that many queries look at a little. ``retrieval-kv`` serves the first alone, ``kvzip`` compares all tokens by
their sharpest look-up. Here the ranking of a profile (``thinkkv patch --score retrieval``, ``sdk/elimination.py``)
spreads most of the tokens over the heads, for what the second reading (``sdk/rehearsal.py``) looks up most sharply
there; the rest is one ranking of all other tokens in all heads, by all the attention that they get.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers, everything
from thinkkv.sdk.plan import KeepPlan, PromptView, pool
from thinkkv.sdk.policies.ranked_heads import HeadScores, best_heads, check_ranking
from thinkkv.sdk.policies.ranked_tokens import keep_best
from thinkkv.sdk.policies.rehearsing import Rehearsing

BISECTIONS = 64
"""Halvings of a logarithm: more precise than whole tokens need."""


@dataclass(frozen=True)
class RehearsedKV(Rehearsing):
    """A head's share grows with its rank, for tokens looked up sharply; the rest is for those looked at most in all.

    Args:
        head_scores: [layers][KV heads] places in the order of elimination, above 0 and up to 1; from a profile.
        by_rank: share of the budget that heads have by their rank, each for the tokens of its most attention.
        power: of a head's score, in proportion to which it has of that share.
        pooling: width of the average over neighbouring attention before these tokens are chosen; 1 takes it as it is.
        sinks, recent: tokens at both ends that every head keeps, its floor.
        whole: prompts of up to so many tokens are kept whole.
    """

    name: ClassVar[str] = "rehearsed-kv"
    profile_score: ClassVar[str] = "retrieval"

    head_scores: HeadScores = ()
    by_rank: float = 0.7
    power: float = 12.0
    pooling: int = 1
    sinks: int = 4
    recent: int = 8

    @property
    def pooling_width(self) -> int:
        """As for the prompt's tokens."""
        return self.pooling

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """Even layers, which the plan may depart from, and what every head has by its rank among all of the model."""
        check_ranking(self.name, self.head_scores)
        even = even_layers(layers, budget)
        total = sum(layer.tokens for layer in even)
        heads = [(layer, head) for layer in layers for head in range(layer.kv_heads)]
        if total >= sum(layer.visible for layer, _ in heads):
            return everything(layers)
        weights = [self.head_scores[layer.layer][head] ** self.power for layer, head in heads]
        ranked = max(math.floor(self.by_rank * total), self.smallest * len(heads))
        shares = iter(in_proportion(weights, [layer.visible for layer, _ in heads], self.smallest, ranked))
        return [
            LayerBudget(mine.tokens, per_head=tuple(next(shares) for _ in range(layer.kv_heads)))
            for layer, mine in zip(layers, even, strict=True)
        ]

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """As if the model had this layer only."""
        return self.plan_model([prompt], [budget])[0]

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """What the heads keep by rank, and the best of all other tokens of all layers together."""
        by_rank = [self._by_rank(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=True)]
        rest = [self._rest(prompt, mine) for prompt, mine in zip(prompts, by_rank, strict=True)]
        kept = keep_best(by_rank, rest, sum(budget.tokens for budget in budgets))
        return [self._keep(*layer) for layer in zip(prompts, budgets, kept, strict=True)]

    def _by_rank(self, prompt: PromptView, budget: LayerBudget) -> torch.Tensor:
        """[n, N] bool: each head's tokens that one query looked up most sharply, both ends among them."""
        kept = torch.ones(prompt.keys.shape[:2], dtype=torch.bool, device=prompt.keys.device)
        if not budget.per_head:
            return kept
        scores = self.with_ends(prompt, pool(self.rehearsed(prompt) * value_norms(prompt), self.pooling))
        for mine, row, tokens in zip(kept, scores, budget.per_head, strict=True):
            mine[row.argsort(descending=True)[tokens:]] = False
        return kept

    def _rest(self, prompt: PromptView, kept: torch.Tensor) -> torch.Tensor:
        """[n, N] float32: how much all queries together took from each token, for those that are not kept already."""
        if kept.all():
            return torch.zeros(kept.shape, device=kept.device)
        taken = self.rehearsed_sum(prompt) * value_norms(prompt)
        # The more a head takes from everywhere, the less it misses one token; by the whole sum, all heads were alike.
        middle = taken[:, self.sinks : prompt.tokens - self.recent].sum(dim=1, keepdim=True)
        return taken / middle.sqrt().clamp(min=torch.finfo(taken.dtype).tiny)

    def _keep(self, prompt: PromptView, budget: LayerBudget, kept: torch.Tensor) -> KeepPlan:
        whole = tuple(kept.all(dim=1).nonzero()[:, 0].tolist())
        return KeepPlan.where(
            kept,
            # Where there is nothing to evict, bounded decoding must know which heads may grow all the same.
            heterogeneous=whole if budget.per_head else best_heads(self.head_scores)[prompt.layer],
            head_scores=torch.tensor(self.head_scores[prompt.layer]),
        )


def value_norms(prompt: PromptView) -> torch.Tensor:
    """[n, N] float32: length of each token's value, since attention to a short one changes little."""
    return prompt.values.float().norm(dim=-1)


def in_proportion(weights: Sequence[float], most: Sequence[int], least: int, total: int) -> list[int]:
    """Whole numbers in proportion to weights, between limits.

    Args:
        weights: 0 or more.
        most: upper limit of each, none below ``least``.
        least: lower limit of all.
        total: at most what they sum to; at least ``least`` for each.
    """

    def shares(log_unit: float) -> list[int]:
        unit = math.exp(log_unit)
        return [max(least, int(min(limit, unit * weight))) for weight, limit in zip(weights, most, strict=True)]

    # Weights may span magnitudes: the unit is looked for on a logarithmic scale, from where no weight makes a whole
    # token to where every weight is at its limit, as far as floats go.
    logs = [math.log(weight) for weight in weights if weight] or [0.0]
    low, high = -max(logs) - 1, min(700.0, math.log(max(most)) - min(logs))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) <= total else (low, middle)
    return shares(low)
