"""A policy, a budget and a model's shape together: what each layer may keep of a prompt, and what was promised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from thinkkv.kernels.entries import entry_bytes, multiple_of
from thinkkv.patches.architecture import LayerShape
from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, check_smallest, even_layers, everything
from thinkkv.sdk.policies import Full, Policy


@dataclass(frozen=True)
class Compression:
    """The rule of one patched model; immutable and shared by all its caches.

    Args:
        policy: what each head keeps.
        budget: how much of it.
        shapes: attention geometry per layer.
        decode: ``append`` keeps every generated token in every head (the paper); ``bounded`` cuts the heads that are
            not heterogeneous back to their size after the prompt (ours).
        dtype: of the model, in whose bytes a ratio is counted.

    Raises:
        BudgetError: heads of such a size cannot be stored as the policy says.
    """

    policy: Policy
    budget: Budget
    shapes: tuple[LayerShape, ...]
    decode: Literal["append", "bounded"] = "append"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        unit = max((multiple_of(stored) for stored in self.policy.stored or ()), default=1)
        for shape in self.shapes:
            if shape.head_dim % unit:
                raise BudgetError(
                    f"cache dtype {self.policy.cache_dtype} needs head dimensions that are multiples of {unit}, "
                    f"this model's is {shape.head_dim} - choose another"
                )

    @property
    def budget_of_entries(self) -> Budget:
        """The budget for tokens as they are stored."""
        if self.policy.stored is None:
            return self.budget
        dims = [shape.head_dim for shape in self.shapes]
        stored, whole = (
            [sum(entry_bytes(dim, dtype) for dtype in dtypes) for dim in dims]
            for dtypes in (self.policy.stored, (self.dtype, self.dtype))
        )
        return replace(self.budget, entry=max(small / large for small, large in zip(stored, whole, strict=True)))

    def allocate(self, prompt_tokens: int) -> tuple[LayerBudget, ...]:
        """Budgets of all layers for a prompt of this length.

        Raises:
            BudgetError: the budget is below the smallest that the policy can work with.
        """
        return _allocate(self, prompt_tokens)

    def promised_tokens(self, prompt_tokens: int) -> tuple[int, ...]:
        """Per layer: the most tokens, summed over KV heads, that the budget allows for such a prompt."""
        layers = self._layers(prompt_tokens)
        whole, share = everything(layers), even_layers(layers, self.budget_of_entries)
        return tuple((share[i] if self._is_compressed(layer) else whole[i]).tokens for i, layer in enumerate(layers))

    def compresses(self, prompt_tokens: int) -> bool:
        """Whether anything of such a prompt is evicted."""
        return self.allocate(prompt_tokens) != tuple(everything(self._layers(prompt_tokens)))

    def bounds(self, layer: int) -> bool:
        """Whether decoding bounds rows of this layer; a sliding window bounds its layer by itself."""
        bounded = self.decode == "bounded" and not isinstance(self.policy, Full)
        return bounded and self.shapes[layer].window is None

    def limit(self, kept_tokens: int) -> int:
        """Tokens to which bounded decoding cuts a row that kept so many of the prompt."""
        return max(kept_tokens, self.policy.always_kept, self.budget.tokens or 0)

    def _layers(self, prompt_tokens: int) -> list[LayerPrompt]:
        return [LayerPrompt(i, shape.kv_heads, shape.visible(prompt_tokens)) for i, shape in enumerate(self.shapes)]

    def _is_compressed(self, layer: LayerPrompt) -> bool:
        return layer.visible > self.policy.always_kept


@lru_cache(maxsize=256)
def _allocate(compression: Compression, prompt_tokens: int) -> tuple[LayerBudget, ...]:
    # Every layer asks for its own budget, and a policy may have to look at all layers to answer.
    layers = compression._layers(prompt_tokens)
    compressed = [layer for layer in layers if compression._is_compressed(layer)]
    budgets = everything(layers)
    if compressed:
        policy, promise = compression.policy, compression.budget_of_entries
        check_smallest(policy.name, compressed, promise, policy.smallest)
        for layer, budget in zip(compressed, policy.layer_budgets(compressed, promise), strict=True):
            budgets[layer.layer] = budget
    return tuple(budgets)
