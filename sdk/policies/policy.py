"""What every cache policy is: a rule that turns a prompt and a budget into a keep-plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers
from thinkkv.sdk.plan import KeepPlan, PromptView

CacheDtype = Literal["model", "int8", "k8v5", "k8v4"]
"""What keys and values are stored in: the model's dtype, or integers with a scale per token of each head: int8, or keys
in int8 and values in five bits or four."""

SMALL_DTYPES: Mapping[CacheDtype, tuple[torch.dtype, torch.dtype]] = {
    "int8": (torch.int8, torch.int8),
    "k8v5": (torch.int8, torch.int16),
    "k8v4": (torch.int8, torch.uint8),
}
"""Dtypes of small entries of keys and values (``kernels/entries.py``)."""


@dataclass(frozen=True)
class Policy(ABC):
    """A rule for what each KV head keeps of the prompt; a frozen dataclass of its named choices.

    Args:
        cache_dtype: what kept tokens, and all that follow, are stored in. Tokens in int8 take about half the bytes of
            16-bit ones (``kernels/entries.py``), so a ratio keeps about twice as many; ``k8v5`` and ``k8v4``:
            44 and 41 % of them at a head dimension of 64.
    """

    name: ClassVar[str]

    compares_layers: ClassVar[bool] = False
    """Whether it plans for all layers together (``plan_model``): a prompt is held whole until all have read it."""

    rehearses: ClassVar[bool] = False
    """Whether the model reads a prompt again before that (``sdk/rehearsal.py``); such a policy compares layers."""

    cache_dtype: CacheDtype = field(default="model", kw_only=True)

    profile_score: ClassVar[str | None] = None
    """The calibration score whose profiles the policy takes as its ``head_scores``; None where it takes none."""

    @property
    def options(self) -> dict[str, Any]:
        """Its named choices; a profile's scores are not among them, nor the usual way of storing."""
        unsaid = ("head_scores",) if self.stored else ("head_scores", "cache_dtype")
        return {name: value for name, value in vars(self).items() if name not in unsaid}

    @property
    def stored(self) -> tuple[torch.dtype, torch.dtype] | None:
        """Dtypes of the entries of keys and values; None where they have the model's."""
        return SMALL_DTYPES.get(self.cache_dtype)

    @property
    @abstractmethod
    def smallest(self) -> int:
        """Tokens per head on average below which the policy cannot work."""

    @property
    def always_kept(self) -> int:
        """A layer that sees no more tokens than this keeps them all, whatever the budget."""
        return self.smallest

    @property
    def held_queries(self) -> int:
        """Last queries of a prompt that the plan for all layers asks for; the others are not held."""
        return 0

    @property
    def reread_queries(self) -> int:
        """Queries of the second reading that the plan asks for, at most so many of each KV head."""
        return 0

    @property
    def shuffles(self) -> bool:
        """Whether the plan asks for queries of tokens in random order besides."""
        return False

    @property
    def kept_ends(self) -> tuple[int, int]:
        """(sinks, recent): what a bounded row always keeps while decoding; the rest goes to the best middle tokens."""
        return 0, self.smallest

    @property
    def pooling_width(self) -> int:
        """Width of the average over neighbouring scores before middle tokens are chosen."""
        return 7

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """Spread the budget of one sequence over the layers that it does not keep whole.

        Args:
            layers: those layers, in order.
            budget: the promise.

        Returns:
            One budget per layer; their sum never exceeds the promise.
        """
        return even_layers(layers, budget)

    @abstractmethod
    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """Choose what each KV head keeps; at most ``budget.tokens`` in all."""

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """Choose for all layers of one sequence: layer by layer, unless it ``compares_layers``."""
        return [self.plan(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=True)]
