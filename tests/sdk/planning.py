"""Made-up models and what they see of a prompt, for tests of policies, and the plans that a policy makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thinkkv import sdk
from thinkkv.patches.architecture import LayerShape
from thinkkv.sdk.budget import Budget, LayerBudget
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies import Policy

LAYERS = 4
"""Of a model that hypothesis makes up."""


@dataclass(frozen=True)
class Model:
    """Geometry of a model and what it sees of a prompt."""

    kv_heads: int
    group: int
    windows: tuple[int | None, ...]
    tokens: int
    seed: int

    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(LayerShape(self.kv_heads * self.group, self.kv_heads, 4, window) for window in self.windows)

    def view(self, layer: int) -> PromptView:
        generator = torch.Generator().manual_seed(self.seed + layer)
        visible = self.shapes()[layer].visible(self.tokens)
        keys, values = torch.randn(2, self.kv_heads, visible, 4, generator=generator)
        queries = 3 * torch.randn(self.kv_heads * self.group, visible, 4, generator=generator)
        most, total = torch.rand(2, self.kv_heads, visible, generator=generator)
        reread = 3 * torch.randn(self.kv_heads, self.group * visible, 4, generator=generator)
        shuffled = 3 * torch.randn(self.kv_heads, self.group * 5, 4, generator=generator)
        return PromptView(layer, len(self.windows), queries, keys, values, 0.5, most, total, reread, shuffled)

    def head_scores(self) -> tuple[tuple[float, ...], ...]:
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(tuple(row) for row in torch.rand(len(self.windows), self.kv_heads, generator=generator).tolist())


def plans_of(policy: Policy, budget: Budget, model: Model) -> list[tuple[PromptView, LayerBudget, KeepPlan]] | None:
    """The plan of every layer, or None where the budget was refused."""
    compression = Compression(policy, budget, model.shapes())
    try:
        shares = compression.allocate(model.tokens)
    except sdk.BudgetError:
        return None
    views = [model.view(layer) for layer in range(len(model.windows))]
    return list(zip(views, shares, policy.plan_model(views, shares), strict=True))
