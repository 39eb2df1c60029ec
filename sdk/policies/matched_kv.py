"""Matched-KV: tokens by what a second reading looks up, with values that make up for the others. Our own policy.

The tokens are ranked as by Reread-KV, each layer by its own measure: attention that is lost changes a layer the more,
the smaller its outputs are. Then the kept tokens' values are changed so that the queries of the second reading get from
them alone, as nearly as can be, what they got from the whole cache (Attention Matching, arXiv:2602.16284).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.matched_values import matched_values
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.reread_kv import RereadKV

SAMPLED = 256
"""Queries of each KV head by which the size of a layer's outputs is told."""


@dataclass(frozen=True)
class MatchedKV(RereadKV):
    """Reread-KV with ranks relative to a layer's outputs and matched values, but for full heads and recent tokens.

    Args:
        ridge: that many full looks at a token weigh as much as its own value.
        queries: of the second reading, at most about so many of each KV head are matched, drawn by chance.
        head_scores, share, sinks, recent, whole: as in Reread-KV.

    Raises:
        BudgetError: ridge or queries are not above 0.
    """

    name: ClassVar[str] = "matched-kv"

    ridge: float = 0.1
    queries: int = 2048

    def __post_init__(self) -> None:
        if not (self.ridge > 0 and self.queries > 0):
            raise BudgetError(
                f"{self.name} has nothing to match with ridge={self.ridge:g} and queries={self.queries} - "
                "choose numbers above 0"
            )

    @property
    def reread_queries(self) -> int:
        """To match."""
        return self.queries

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """The plans of the ranking, with values."""
        plans = super().plan_model(prompts, budgets)
        return [self._matched(prompt, plan) for prompt, plan in zip(prompts, plans, strict=True)]

    def _matched(self, prompt: PromptView, plan: KeepPlan) -> KeepPlan:
        if plan.tokens == prompt.tokens * prompt.kv_heads:
            return plan
        heads = zip(self.reread(prompt), prompt.keys, prompt.values, plan.kept, strict=True)
        values = tuple(
            None
            if len(kept) == prompt.tokens
            else matched_values(queries, keys, own, kept, recent=self.recent, scale=prompt.scale, ridge=self.ridge)
            for queries, keys, own, kept in heads
        )
        return replace(plan, values=values)

    def _scores(self, prompt: PromptView, certain: torch.Tensor) -> torch.Tensor:
        scores = super()._scores(prompt, certain)
        return scores if certain.all() else scores / self._output_size(prompt)

    def _output_size(self, prompt: PromptView) -> torch.Tensor:
        """Root mean square of what the layer's heads give the second reading of the prompt."""
        queries = self.reread(prompt)
        some = queries[:, :: max(1, queries.shape[1] // SAMPLED)].float()
        weights = (some @ prompt.keys.float().mT).mul_(prompt.scale).softmax(dim=-1)
        size = (weights @ prompt.values.float()).square().mean().sqrt()
        return size.clamp(min=torch.finfo(size.dtype).tiny)
