"""The byte budget of a prompt's cache and how a policy spreads it over the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thinkkv.patches.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """What the user promised: a share of the full cache, or tokens per head on average.

    Args:
        ratio: share of the prompt's full cache, in (0, 1].
        tokens: tokens per KV head on average; exactly one of the two is given.
        entry: bytes of a stored token as a share of what it takes in the model's dtype; a ratio is one of bytes.
    """

    ratio: float | None = None
    tokens: int | None = None
    entry: float = 1.0

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.tokens is None):
            raise BudgetError("give either a ratio or a number of tokens - not both, not neither")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise BudgetError(f"ratio {self.ratio:g} is no share of the full cache - use one above 0 and up to 1")
        if self.tokens is not None and self.tokens < 1:
            raise BudgetError(f"a budget of {self.tokens} tokens per head holds nothing - use 1 or more")

    def tokens_per_head(self, visible: int) -> float:
        """Tokens per KV head that a layer with ``visible`` tokens may keep on average."""
        if self.ratio is not None:
            return min(self.ratio / self.entry, 1.0) * visible
        assert self.tokens is not None
        return min(self.tokens, visible)


@dataclass(frozen=True)
class LayerPrompt:
    """One sequence's prompt as one layer can still see it.

    Args:
        layer: index in the model.
        kv_heads: n.
        visible: tokens that the layer's window admits after the prompt; all of them without a window.
    """

    layer: int
    kv_heads: int
    visible: int


@dataclass(frozen=True)
class LayerBudget:
    """What one layer may keep of one sequence's prompt.

    Args:
        tokens: B, tokens summed over the layer's KV heads.
        full_heads: KV heads that keep everything, where the policy decides that over all layers at once.
        per_head: tokens that each KV head has for certain, where the policy decides that over all layers at once.
    """

    tokens: int
    full_heads: tuple[int, ...] = ()
    per_head: tuple[int, ...] = ()


def even_layers(layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
    """Every layer gets the same share of its own full cache: ``B = ratio * n * N``."""
    return [LayerBudget(math.floor(budget.tokens_per_head(layer.visible) * layer.kv_heads)) for layer in layers]


def everything(layers: Sequence[LayerPrompt]) -> list[LayerBudget]:
    """Every layer keeps all that its window admits."""
    return [LayerBudget(layer.visible * layer.kv_heads) for layer in layers]


def check_smallest(policy: str, layers: Sequence[LayerPrompt], budget: Budget, smallest: int) -> None:
    """Raise BudgetError where a head would get fewer than ``smallest`` tokens on average."""
    visible = min((layer.visible for layer in layers), default=0)
    have = math.floor(budget.tokens_per_head(visible))
    if not layers or have >= smallest:
        return
    if budget.ratio is None:
        raise BudgetError(
            f"a budget of {budget.tokens} tokens per head is below the smallest that {policy} can work with - "
            f"use --budget {smallest} or more"
        )
    larger = (replace(budget, ratio=percent / 100) for percent in range(1, 101))
    needed = next(budget.ratio for budget in larger if math.floor(budget.tokens_per_head(visible)) >= smallest)
    raise BudgetError(
        f"ratio {budget.ratio:g} of {visible} tokens leaves {have} per head, {policy} needs at least {smallest} - "
        f"use --ratio {needed:g} or more"
    )
