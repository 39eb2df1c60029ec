"""A ranking of all KV heads of a model by a profile (``thinkkv patch --score retrieval``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from thinkkv.patches.errors import ProfileMismatchError
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers
from thinkkv.sdk.plan import KeepPlan, PromptView

HeadScores = tuple[tuple[float, ...], ...]
"""[layers][KV heads], higher keeps more."""

SHARE = 0.2
"""Of all KV heads, the best that answers cannot do without."""


def check_ranking(policy: str, scores: HeadScores) -> None:
    """Raise ProfileMismatchError where a policy that needs a profile has none."""
    if not scores:
        raise ProfileMismatchError(
            f"{policy} chooses its heads by a profile - calibrate one with "
            "`thinkkv patch --score retrieval` and pass it"
        )


def ranked(scores: HeadScores, layers: Iterable[int]) -> list[tuple[int, int]]:
    """(layer, KV head) of these layers, best score first."""
    heads = [(layer, head) for layer in layers for head in range(len(scores[layer]))]
    return sorted(heads, key=lambda head: -scores[head[0]][head[1]])


def best_heads(scores: HeadScores, share: float = SHARE) -> tuple[tuple[int, ...], ...]:
    """Per layer, its heads among the best ``share`` of the whole model."""
    order = ranked(scores, range(len(scores)))
    chosen = set(order[: round(share * len(order))])
    return tuple(tuple(head for head in range(len(row)) if (layer, head) in chosen) for layer, row in enumerate(scores))


def with_full_heads(
    scores: HeadScores, share: float, layers: Sequence[LayerPrompt], budget: Budget, *, least: int
) -> list[LayerBudget]:
    """As many of the best ``share`` of all heads as fit are full; every other head of the model gets the same tokens.

    Args:
        scores: of all layers.
        share: of these layers' heads.
        layers: that are not kept whole.
        budget: the promise.
        least: tokens that every other head must get.
    """
    total = sum(layer.tokens for layer in even_layers(layers, budget))
    visible = {layer.layer: layer.visible for layer in layers}
    ranking = ranked(scores, (layer.layer for layer in layers))
    for count in range(round(share * len(ranking)), -1, -1):
        full = ranking[:count]
        left = total - sum(visible[layer] for layer, _ in full)
        each = _level([visible[layer] for layer, _ in ranking[count:]], left)
        if each >= least:
            break
    return [_layer_budget(layer, each, tuple(sorted(h for at, h in full if at == layer.layer))) for layer in layers]


def keeps_whole(prompt: PromptView, budget: LayerBudget) -> bool:
    """Whether nothing of this layer is evicted."""
    return budget.tokens >= prompt.tokens * prompt.kv_heads


def full_heads(scores: HeadScores, share: float, prompt: PromptView, budget: LayerBudget) -> tuple[int, ...]:
    """Those of the budget; where nothing is evicted, those that would keep everything."""
    return best_heads(scores, share)[prompt.layer] if keeps_whole(prompt, budget) else budget.full_heads


def plans_where(
    kept: Sequence[torch.Tensor],
    prompts: Sequence[PromptView],
    budgets: Sequence[LayerBudget],
    scores: HeadScores,
    share: float,
) -> list[KeepPlan]:
    """The plans that keep what a [n, N] mask for each layer says, with the full heads named."""
    return [
        KeepPlan.where(
            mine,
            heterogeneous=full_heads(scores, share, prompt, budget),
            head_scores=torch.tensor(scores[prompt.layer]),
        )
        for mine, prompt, budget in zip(kept, prompts, budgets, strict=True)
    ]


def _layer_budget(layer: LayerPrompt, each: int, full: tuple[int, ...]) -> LayerBudget:
    others = layer.kv_heads - len(full)
    return LayerBudget(len(full) * layer.visible + others * min(each, layer.visible), full)


def _level(visible: Sequence[int], tokens: int) -> int:
    """Tokens per head if what heads of short layers cannot use goes to those of long ones."""
    rest = sorted(visible)
    while rest and tokens // len(rest) >= rest[0]:
        tokens -= rest.pop(0)
    return tokens // len(rest) if rest else max(visible, default=tokens)
