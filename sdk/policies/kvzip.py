"""KVzip: keep what the model looks up when it reads the prompt a second time (arXiv:2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.patches.errors import UnsupportedGenerationError
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.policy import Policy


@dataclass(frozen=True)
class KVzip(Policy):
    """One ranking of all tokens in all KV heads and layers by their most attention in a rehearsal.

    The prompt of the paper that asks for a repetition is left out, since a cache knows no words: the text alone is
    read again (``sdk/rehearsal.py``). What is kept is really stored, every head with a length of its own.

    Args:
        sinks, recent: tokens at both ends that every head keeps; ours, the paper keeps a system prompt.
    """

    name: ClassVar[str] = "kvzip"
    rehearses: ClassVar[bool] = True

    sinks: int = 16
    recent: int = 32

    @property
    def smallest(self) -> int:
        """Both ends."""
        return self.sinks + self.recent

    @property
    def always_kept(self) -> int:
        """With the defaults as short a prompt as Task-KV keeps whole: a few bytes are not worth a second reading."""
        return self.sinks + 8 * self.recent

    @property
    def kept_ends(self) -> tuple[int, int]:
        """Sinks and recent tokens."""
        return self.sinks, self.recent

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """As if the model had this layer only."""
        return self.plan_model([prompt], [budget])[0]

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """The best tokens of all layers together; layers that are to be kept whole come first."""
        scores = [self._scores(prompt, budget) for prompt, budget in zip(prompts, budgets, strict=True)]
        ranked = torch.cat([layer.flatten() for layer in scores])
        best = ranked.topk(min(len(ranked), sum(budget.tokens for budget in budgets))).indices
        kept = torch.zeros_like(ranked, dtype=torch.bool).index_fill(0, best, True)
        parts = kept.split([layer.numel() for layer in scores])
        return [
            KeepPlan(kept=tuple(row.nonzero()[:, 0] for row in part.view_as(layer)))
            for part, layer in zip(parts, scores, strict=True)
        ]

    def _scores(self, prompt: PromptView, budget: LayerBudget) -> torch.Tensor:
        """[n, N] float32: how much each token was attended to, infinitely where it is kept for certain."""
        if budget.tokens >= prompt.tokens * prompt.kv_heads:
            return torch.full(prompt.keys.shape[:2], float("inf"), device=prompt.keys.device)
        if prompt.rehearsed is None:
            raise UnsupportedGenerationError(
                "kvzip needs a prompt that was read twice - pass it through the model that sdk.apply patched, "
                "not through its decoder layers"
            )
        scores = prompt.rehearsed.clone()
        scores[:, : self.sinks] = scores[:, prompt.tokens - self.recent :] = float("inf")
        return scores
