"""Task-KV: heads far from their layer's semantic center keep everything (arXiv:2501.15113).

The other heads keep attention sinks, recent tokens and the middle tokens they attend to most. What the paper leaves
open is an option here, with its default argued in docs/fidelity.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.sinks_middle_recent import SinksMiddleRecent, Split
from thinkkv.sdk.separator import Reduction, Unit, head_distances

Nearest = Literal["inside", "on-top", "none"]
Rounding = Literal["nearest", "floor", "ceil"]
_ROUND: dict[str, Callable[[float], int]] = {
    "nearest": lambda value: math.floor(value + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}


@dataclass(frozen=True)
class TaskKV(SinksMiddleRecent):
    """Task-KV with its published constants.

    Args:
        beta: share of a bottom layer's heads that are heterogeneous (eq. 16); default .25 for MHA, .3 for GQA, as the
            paper has it for Llama-2-7B and Mistral-7B.
        top_layer_heads: m of eq. 16; default an eighth of the heads, at least 1: the paper's 4 of 32 and 1 of 8.
        sinks, recent: s1 and s2.
        observation_window: L of eq. 12, for the separator and for the middle tokens.
        pooling: for the middle tokens.
        top: t of eq. 14, tokens in a semantic vector.
        unit, reduction: how query heads that share a KV head count (our choice; the paper is silent).
        nearest: whether the head nearest to the center counts inside f(r), on top of it, or is not added.
        rounding: of f(r) to whole heads (our choice).
        head_scores: [layers][KV heads] mean distances of a profile; fixes the classes instead of the prompt.
    """

    name: ClassVar[str] = "task-kv"
    profile_score: ClassVar[str] = "distance"

    beta: float | None = None
    top_layer_heads: int | None = None
    top: int = 256
    unit: Unit = "query"
    reduction: Reduction = "max"
    nearest: Nearest = "inside"
    rounding: Rounding = "nearest"
    head_scores: tuple[tuple[float, ...], ...] | None = None

    def heterogeneous_count(self, kv_heads: int, query_heads: int, layer: int, layers: int) -> int:
        """f(r), eq. 16: fewer full heads toward the top layers, rounded to whole heads."""
        n = kv_heads
        beta = self.beta if self.beta is not None else (0.25 if query_heads == n else 0.3)
        top = self.top_layer_heads if self.top_layer_heads is not None else max(1, round(n / 8))
        depth = layer / max(1, layers - 1)
        return min(n, max(0, _ROUND[self.rounding](n * beta - (n * beta - top) * depth)))

    def split(self, prompt: PromptView, budget: LayerBudget) -> Split:
        """Eq. 17 with whole tokens, and our fallback for k < 0: fewer full heads, no middle, fewer recent."""
        for full in range(self._preset(prompt), 0, -1):
            others = prompt.kv_heads - full
            each = (budget.tokens - prompt.tokens * full) // others if others else -1
            if each >= self.sinks + self.recent:
                return self.split_of(full, each)
        return self.split_of(0, budget.tokens // prompt.kv_heads)

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Separate the heads and choose the other heads' tokens."""
        scores = prompt.window_scores(self.observation_window)
        distances = self._distances(prompt, scores)
        if budget.tokens >= prompt.tokens * prompt.kv_heads:
            # Nothing to evict, but bounded decoding must know the classes all the same.
            full = self._choose(distances, self._preset(prompt))
            return KeepPlan.everything(prompt, heterogeneous=full, head_scores=distances)
        split = self.split(prompt, budget)
        full = self._choose(distances, split.full)
        return KeepPlan(
            kept=self.keep(prompt, full, split, prompt.per_kv_head(scores)),
            heterogeneous=full,
            head_scores=distances,
        )

    def _preset(self, prompt: PromptView) -> int:
        """Full heads that the paper presets for this layer, before any fallback."""
        count = self.heterogeneous_count(prompt.kv_heads, prompt.queries.shape[0], prompt.layer, prompt.layers)
        return min(prompt.kv_heads, count + (self.nearest == "on-top"))

    def _choose(self, distances: torch.Tensor, count: int) -> tuple[int, ...]:
        return choose_heads(distances, count, nearest=self.nearest != "none")

    def _distances(self, prompt: PromptView, scores: torch.Tensor) -> torch.Tensor:
        if self.head_scores is not None:
            return torch.tensor(self.head_scores[prompt.layer])
        return head_distances(prompt, scores, top=self.top, unit=self.unit, reduction=self.reduction)


def choose_heads(distances: torch.Tensor, count: int, *, nearest: bool) -> tuple[int, ...]:
    """The ``count`` heads farthest from the center, the last of them replaced by the nearest head.

    A single full head is the farthest one: with one place, the paper's extra head would be the only one.

    Args:
        distances: [n].
        count: how many to choose.
        nearest: whether the nearest head is among them.

    Returns:
        KV head indices, ascending.
    """
    farthest_first = torch.argsort(distances, descending=True, stable=True).tolist()
    chosen = farthest_first[:count]
    if nearest and 1 < count < len(farthest_first):
        chosen[-1] = farthest_first[-1]
    return tuple(sorted(chosen))
