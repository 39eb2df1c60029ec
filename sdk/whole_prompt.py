"""A batch of prompts in one layer, before anything of it is evicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from thinkkv.sdk.plan import PromptView
from thinkkv.sdk.prompt_attention import real_tokens


@dataclass(frozen=True)
class WholePrompt:
    """What a layer computed for its prompts.

    Args:
        query: [B, Hq, N, D], rotated; or [B, Hq, Q, D] of each sequence's last Q real tokens.
        keys, values: [B, n, N, D], contiguous.
        scale: softmax scale.
        real: [B, N] bool, False at padding; None where there is none.
        rehearsed: [B, n, N] float32, the most attention that each token got in a rehearsal.
        rehearsed_sum: [B, n, N] float32, all of it together.
        reread, shuffled: per sequence [n, R, D], queries of the rehearsal that a policy asks for, and of its tokens in
            random order.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    real: torch.Tensor | None = None
    rehearsed: torch.Tensor | None = None
    rehearsed_sum: torch.Tensor | None = None
    reread: tuple[torch.Tensor, ...] = ()
    shuffled: tuple[torch.Tensor, ...] = ()

    @cached_property
    def columns(self) -> list[slice | torch.Tensor]:
        """Per sequence, where its real tokens stand."""
        batch, _, tokens, _ = self.keys.shape
        return [slice(0, tokens)] * batch if self.real is None else real_tokens(self.real)

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence."""
        batch, _, tokens, _ = self.keys.shape
        return [tokens] * batch if self.real is None else self.real.sum(dim=1).tolist()

    def with_last_queries(self, count: int) -> WholePrompt:
        """The same with no more than so many queries of each sequence, aligned at their ends."""
        if count >= self.query.shape[2]:
            return self
        query = self.query.new_zeros(*self.query.shape[:2], count, self.query.shape[3])
        for mine, all_of_it, columns in zip(query, self.query, self.columns, strict=True):
            own = all_of_it[:, columns]
            last = own[:, max(0, own.shape[1] - count) :]
            mine[:, count - last.shape[1] :] = last
        return replace(self, query=query)

    def view(self, sequence: int, layer: int, layers: int, visible: int) -> PromptView:
        """What a policy sees of one sequence: its last ``visible`` tokens in this layer of so many."""
        first = self.lengths[sequence] - visible

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[sequence, :, self.columns[sequence]][:, first:]

        query = own(self.query) if self.query.shape[2] == self.keys.shape[2] else self.query[sequence]
        most, total = (None if noted is None else own(noted) for noted in (self.rehearsed, self.rehearsed_sum))
        queries = (found[sequence] if found else None for found in (self.reread, self.shuffled))
        return PromptView(layer, layers, query, own(self.keys), own(self.values), self.scale, most, total, *queries)
