"""Cache layers that hold their prompts whole until all layers have read them, and may be read again meanwhile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from thinkkv.patches.errors import UnsupportedGenerationError
from thinkkv.sdk.layer import HeterogeneousLayer
from thinkkv.sdk.plan import KeepPlan
from thinkkv.sdk.rehearsal import Chunk, attend_again
from thinkkv.sdk.whole_prompt import WholePrompt


class HoldingLayer(HeterogeneousLayer):
    """Holds its prompts whole until it is filled by a plan; meanwhile they may be rehearsed."""

    held: WholePrompt | None = None
    chunk: Chunk | None = None
    """In a rehearsal: what comes."""

    def reset(self) -> None:
        """Forget everything and free the storage."""
        super().reset()
        self.held = None

    def compact(self, prompt: WholePrompt) -> None:
        """Only hold it."""
        self.held = prompt

    def fill(self, prompt: WholePrompt, plans: Sequence[KeepPlan]) -> None:
        """Fill the store, and hold the prompts no longer."""
        super().fill(prompt, plans)
        self.held = None

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attend a rehearsal to the held prompts and to itself, and note their attention; store nothing of it."""
        if self.held is None:
            return super().attend(query, keys, values, **options)
        if self.chunk is None:
            raise UnsupportedGenerationError(
                "the prompt in this cache was not compressed - start a new cache, with the patch in force that made it"
            )
        held, window, real = self.held, self.shape.window, options["real"]
        out, most, total = attend_again(held, query, keys, values, real, window, self.chunk.counted_from)
        if self.chunk.shuffled:
            self.held = replace(held, shuffled=tuple(map(self._by_kv_head, query)))
            return out
        if held.rehearsed is not None and held.rehearsed_sum is not None:
            most, total = torch.maximum(held.rehearsed, most), held.rehearsed_sum + total
        reread = self._reread(WholePrompt(query, keys, values, held.scale, real), self.chunk)
        if held.reread:
            reread = tuple(torch.cat(pair, dim=1) for pair in zip(held.reread, reread, strict=True))
        self.held = replace(held, rehearsed=most, rehearsed_sum=total, reread=reread)
        return out

    def _reread(self, chunk: WholePrompt, wanted: Chunk) -> tuple[torch.Tensor, ...]:
        """Per sequence [n, R, D]: as many queries of each KV head, drawn by chance, as this chunk has to give."""
        assert self.held is not None
        if wanted.held_queries == 0:
            return ()
        found = []
        for sequence, (columns, tokens) in enumerate(zip(chunk.columns, self.held.lengths, strict=True)):
            queries = self._by_kv_head(chunk.query[sequence][:, columns][:, wanted.counted_from :])
            share = min(1.0, wanted.held_queries / max(1, tokens * self.shape.query_group))
            # Seeded, so that a sequence has the same ones in whatever batch it stands.
            drawn = torch.randperm(queries.shape[1], generator=torch.Generator().manual_seed(self.index))
            found.append(queries[:, drawn[: math.ceil(share * len(drawn))].to(queries.device)])
        return tuple(found)

    def _by_kv_head(self, query: torch.Tensor) -> torch.Tensor:
        """[n, R, D] queries of [Hq, T, D]: of all query heads of each group."""
        return query.unflatten(0, (self.shape.kv_heads, -1)).flatten(1, 2)


class ComparedLayer(HoldingLayer):
    """A layer of a policy that compares layers: what it holds of its prompts is what it may store of them."""

    def compact(self, prompt: WholePrompt) -> None:
        """Hold it without the queries that no plan asks for: all are larger than keys and values together.

        Raises:
            BudgetError: the budget is too small for one of them.
        """
        for tokens in prompt.lengths:
            self.compression.allocate(tokens)
        super().compact(prompt.with_last_queries(self.compression.policy.held_queries))
