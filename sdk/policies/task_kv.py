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

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView, best, pool, sinks_middle_recent
from thinkkv.sdk.policies.policy import Policy
from thinkkv.sdk.separator import Reduction, Unit, head_distances

Nearest = Literal["inside", "on-top", "none"]
Rounding = Literal["nearest", "floor", "ceil"]
_ROUND: dict[str, Callable[[float], int]] = {
    "nearest": lambda value: math.floor(value + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}


@dataclass(frozen=True)
class Split:
    """How a layer's budget falls to its heads, after the fallback where the paper's k would be negative.

    Args:
        full: heads that keep everything.
        sinks, middle, recent: tokens of each other head.
    """

    full: int
    sinks: int
    middle: int
    recent: int


@dataclass(frozen=True)
class TaskKV(Policy):
    """Task-KV with its published constants.

    Args:
        beta: share of a bottom layer's heads that are heterogeneous (eq. 16); default .25 for MHA, .3 for GQA, as the
            paper has it for Llama-2-7B and Mistral-7B.
        top_layer_heads: m of eq. 16; default an eighth of the heads, at least 1: the paper's 4 of 32 and 1 of 8.
        sinks, recent: s1 and s2, tokens of every other head.
        observation_window: L of eq. 12, queries.
        top: t of eq. 14, tokens in a semantic vector.
        pooling: width of the average over neighbouring scores before the middle tokens are chosen.
        unit, reduction: how query heads that share a KV head count (our choice; the paper is silent).
        nearest: whether the head nearest to the center counts inside f(r), on top of it, or is not added.
        rounding: of f(r) to whole heads (our choice).
        head_scores: [layers][KV heads] mean distances of a profile; fixes the classes instead of the prompt.
    """

    name: ClassVar[str] = "task-kv"

    beta: float | None = None
    top_layer_heads: int | None = None
    sinks: int = 16
    recent: int = 256
    observation_window: int = 32
    top: int = 256
    pooling: int = 7
    unit: Unit = "query"
    reduction: Reduction = "max"
    nearest: Nearest = "inside"
    rounding: Rounding = "nearest"
    head_scores: tuple[tuple[float, ...], ...] | None = None

    @property
    def smallest(self) -> int:
        """The sinks and the observation window itself: the question must survive."""
        return self.sinks + self.observation_window

    @property
    def kept_ends(self) -> tuple[int, int]:
        """Sinks and recent tokens."""
        return self.sinks, self.recent

    @property
    def pooling_width(self) -> int:
        """As for the prompt's middle tokens."""
        return self.pooling

    @property
    def always_kept(self) -> int:
        """Sinks and recent tokens: a shorter prompt has no middle."""
        return self.sinks + self.recent

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
                return Split(full, self.sinks, each - self.sinks - self.recent, self.recent)
        each = budget.tokens // prompt.kv_heads
        recent = min(self.recent, each - self.sinks)
        return Split(0, self.sinks, each - self.sinks - recent, recent)

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
            kept=keep_split(prompt, full, split, prompt.per_kv_head(scores), self.pooling),
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


def keep_split(
    prompt: PromptView, full: tuple[int, ...], split: Split, scores: torch.Tensor, pooling: int
) -> tuple[torch.Tensor, ...]:
    """Kept positions per KV head: everything for ``full``, sinks + best middle + recent for the others.

    Args:
        scores: [n, N] window scores per KV head.
    """
    tokens, device = prompt.tokens, prompt.keys.device
    if split.sinks + split.recent > tokens or split.recent < 0:
        raise BudgetError(f"{split.sinks} sinks and {split.recent} recent tokens do not fit {tokens} - shorten them")
    between = pool(scores[:, split.sinks : tokens - split.recent], pooling)
    others = sinks_middle_recent(
        [head for head in range(prompt.kv_heads) if head not in full],
        tokens,
        sinks=split.sinks,
        recent=split.recent,
        middle=best(between, split.middle, offset=split.sinks),
        device=device,
    )
    whole = torch.arange(tokens, device=device)
    return tuple(others.get(head, whole) for head in range(prompt.kv_heads))
