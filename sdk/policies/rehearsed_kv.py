"""Rehearsed-KV: a head's rank says how many tokens it keeps, a second reading says which. Ours, not a paper's.

``retrieval-kv`` makes a few heads full and all others poor alike, and loses what takes many heads. ``kvzip`` compares
tokens of all heads by attention alone, though some heads look sharply at what no answer needs. Here the ranking of a
profile (``thinkkv patch --score retrieval``, ``sdk/elimination.py``) spreads the tokens over the heads, and each head
keeps what the second reading (``sdk/rehearsal.py``) looks up in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers, everything
from thinkkv.sdk.plan import KeepPlan, PromptView, best, pool
from thinkkv.sdk.policies.ranked_heads import HeadScores, best_heads, check_ranking
from thinkkv.sdk.policies.rehearsing import Rehearsing

BISECTIONS = 64
"""Halvings of a logarithm: more precise than whole tokens need."""


@dataclass(frozen=True)
class RehearsedKV(Rehearsing):
    """A head's share of the tokens grows with its rank; it keeps those attended to most in a rehearsal.

    Args:
        head_scores: [layers][KV heads] places in the order of elimination, above 0 and up to 1; from a profile.
        even: share of the budget that all heads have alike.
        power: of a head's score, in proportion to which it has of the rest.
        pooling: width of the average over neighbouring attention before tokens are chosen.
        sinks, recent: tokens at both ends that every head keeps, its floor.
    """

    name: ClassVar[str] = "rehearsed-kv"
    profile_score: ClassVar[str] = "retrieval"

    head_scores: HeadScores = ()
    even: float = 0.3
    power: float = 12.0
    pooling: int = 7

    @property
    def pooling_width(self) -> int:
        """As for the prompt's tokens."""
        return self.pooling

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """Every head's tokens, from its rank among all heads of the model."""
        check_ranking(self.name, self.head_scores)
        total = sum(layer.tokens for layer in even_layers(layers, budget))
        heads = [(layer, head) for layer in layers for head in range(layer.kv_heads)]
        if total >= sum(layer.visible for layer, _ in heads):
            return everything(layers)
        earned = [self.head_scores[layer.layer][head] ** self.power for layer, head in heads]
        mean = sum(earned) / len(earned) or 1.0
        weights = [self.even + (1 - self.even) * one / mean for one in earned]
        shares = iter(in_proportion(weights, [layer.visible for layer, _ in heads], self.smallest, total))
        per_head = [tuple(next(shares) for _ in range(layer.kv_heads)) for layer in layers]
        return [LayerBudget(sum(tokens), per_head=tokens) for tokens in per_head]

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Each head's tokens that were attended to most, both ends among them."""
        ranks = torch.tensor(self.head_scores[prompt.layer])
        if not budget.per_head:
            # Nothing to evict, but bounded decoding must know which heads may grow all the same.
            full = best_heads(self.head_scores)[prompt.layer]
            return KeepPlan.everything(prompt, heterogeneous=full, head_scores=ranks)
        scores = self.with_ends(prompt, pool(self.rehearsed(prompt), self.pooling))
        kept = (best(row[None], tokens)[0] for row, tokens in zip(scores, budget.per_head, strict=True))
        return KeepPlan(
            kept=tuple(positions.sort().values for positions in kept),
            heterogeneous=tuple(h for h, tokens in enumerate(budget.per_head) if tokens == prompt.tokens),
            head_scores=ranks,
        )


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
