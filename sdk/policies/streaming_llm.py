"""StreamingLLM: keep the attention sinks and the most recent tokens (arXiv:2309.17453)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.policy import Policy


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Uniform sinks + recent window for every KV head.

    Args:
        sinks: first positions kept, tokens.
    """

    name: ClassVar[str] = "streaming-llm"

    sinks: int = 4

    @property
    def smallest(self) -> int:
        """The sinks and one recent token."""
        return self.sinks + 1

    @property
    def kept_ends(self) -> tuple[int, int]:
        """Sinks, and all the rest for recent tokens."""
        return self.sinks, sys.maxsize

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """The same ends of the prompt for every head."""
        each = budget.tokens // prompt.kv_heads
        if each >= prompt.tokens:
            return KeepPlan.everything(prompt)
        device = prompt.keys.device
        recent = torch.arange(prompt.tokens - (each - self.sinks), prompt.tokens, device=device)
        positions = torch.cat([torch.arange(self.sinks, device=device), recent])
        return KeepPlan(kept=(positions,) * prompt.kv_heads)
