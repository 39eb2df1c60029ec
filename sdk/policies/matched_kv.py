"""Matched-KV: tokens by what a second reading looks up, and entries that make up for the others. Our own policy.

The tokens are ranked as by Reread-KV, each layer by its own measure: attention that is lost changes a layer the more,
the smaller its outputs are. Evicted tokens leave a few summaries of themselves, which weigh what these weighed for
tokens in random order: the second reading has chosen them by how little it needs them. Then the values of all are
changed so that its queries get from them alone, as nearly as can be, what they got from the whole cache (Attention
Matching, arXiv:2602.16284).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.matched_values import matched_values
from thinkkv.sdk.plan import Entries, KeepPlan, PromptView
from thinkkv.sdk.policies.ranked_heads import keeps_whole
from thinkkv.sdk.policies.reread_kv import RereadKV
from thinkkv.sdk.products import products_of
from thinkkv.sdk.reference_queries import ReferenceQueries
from thinkkv.sdk.summaries import summarize

SAMPLED = 256
"""Queries of each KV head by which the size of a layer's outputs is told."""

SUMMARY_RIDGE = 0.1
"""Towards the mean of what is summarised: questions ask otherwise than tokens in random order, too."""

MOST_SUMMARIES = 0.25
"""Of the tokens of a head that are ranked at all; the others are."""


@dataclass(frozen=True)
class MatchedKV(RereadKV):
    """Reread-KV with ranks relative to a layer's outputs, summaries, and matched values (not of full heads).

    Args:
        summaries: entries of each head that stand for its evicted tokens; fewer where the budget is small.
        ridge: that many full looks at a token weigh as much as its own value.
        queries: of the second reading, at most about so many of each KV head are matched, drawn by chance.
        head_scores, share, sinks, recent, whole: as in Reread-KV.

    Raises:
        BudgetError: ridge or queries are not above 0, or summaries below.
    """

    name: ClassVar[str] = "matched-kv"

    summaries: int = 4
    ridge: float = 0.1
    queries: int = 2048

    def __post_init__(self) -> None:
        if not (self.ridge > 0 and self.queries > 0):
            raise BudgetError(
                f"{self.name} has nothing to match with ridge={self.ridge:g} and queries={self.queries} - "
                "choose numbers above 0"
            )
        if self.summaries < 0:
            raise BudgetError(f"{self.name} cannot keep summaries={self.summaries} - choose 0 or more")

    @property
    def reread_queries(self) -> int:
        """To match."""
        return self.queries

    @property
    def shuffles(self) -> bool:
        """To summarise."""
        return self.summaries > 0

    def plan_model(self, prompts: Sequence[PromptView], budgets: Sequence[LayerBudget]) -> list[KeepPlan]:
        """The plans of the ranking, with entries of their own."""
        summaries = [self._summaries(*layer) for layer in zip(prompts, budgets, strict=True)]
        left = [self._without(*layer) for layer in zip(prompts, budgets, summaries, strict=True)]
        with products_of(prompts[0].keys.dtype):
            plans = super().plan_model(prompts, left)
            return [self._matched(*layer) for layer in zip(prompts, plans, summaries, strict=True)]

    def _summaries(self, prompt: PromptView, budget: LayerBudget) -> int:
        """Of each head that evicts anything."""
        others = prompt.kv_heads - len(budget.full_heads)
        if keeps_whole(prompt, budget) or others == 0:
            return 0
        ranked = budget.tokens - prompt.tokens * len(budget.full_heads) - self.smallest * others
        return max(0, min(self.summaries, int(MOST_SUMMARIES * ranked) // others))

    def _without(self, prompt: PromptView, budget: LayerBudget, summaries: int) -> LayerBudget:
        """What is left for tokens."""
        return replace(budget, tokens=budget.tokens - summaries * (prompt.kv_heads - len(budget.full_heads)))

    def _matched(self, prompt: PromptView, plan: KeepPlan, summaries: int) -> KeepPlan:
        if plan.tokens == prompt.tokens * prompt.kv_heads:
            return plan
        heads = [self._head(prompt, head, kept, summaries) for head, kept in enumerate(plan.kept)]
        kept, entries = zip(*heads, strict=True)
        return replace(plan, kept=kept, entries=entries)

    def _head(
        self, prompt: PromptView, head: int, kept: torch.Tensor, summaries: int
    ) -> tuple[torch.Tensor, Entries | None]:
        """[S] positions of one KV head, and what it stores there; None for its own keys and values."""
        if len(kept) == prompt.tokens:
            return kept, None
        keys, values = prompt.keys[head], prompt.values[head]
        reference = ReferenceQueries.of(self.reread(prompt)[head], keys, values, prompt.scale)
        own = keys[kept].float(), values[kept].float()
        if summaries:
            evicted = torch.ones(prompt.tokens, dtype=torch.bool, device=keys.device)
            evicted[kept] = False
            others = ReferenceQueries.of(self.shuffled(prompt)[head], keys, values, prompt.scale)
            places, *summary = summarize(
                others, keys, values, evicted.nonzero()[:, 0], count=summaries, ridge=SUMMARY_RIDGE
            )
            kept, order = torch.cat([kept, places]).sort()
            of_keys, of_values = (torch.cat(pair)[order] for pair in zip(own, summary, strict=True))
            own = of_keys, of_values
        return kept, (own[0], matched_values(reference, own, recent=self.recent, ridge=self.ridge))

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
