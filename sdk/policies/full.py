"""The whole cache, in the same store: the yardstick, and a cache that never concatenates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, everything
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.policy import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Every head keeps every token; a budget has no effect."""

    name: ClassVar[str] = "full"

    @property
    def smallest(self) -> int:
        """Needs nothing."""
        return 0

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """All of every layer."""
        return everything(layers)

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Keep everything."""
        return KeepPlan.everything(prompt)
