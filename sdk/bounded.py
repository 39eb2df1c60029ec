"""Bounded decoding: heads that do not keep everything stay at a fixed size however long the model reasons. Ours.

Task-KV appends every generated token to every head. Prompts of reasoning models are short and their chains long, so
most of the cache would then be what decoding appended. Here a bounded row grows by at most SEGMENT tokens beyond its
limit and is then cut back: sinks and recent tokens stay, and of what lies between, the tokens that the newest queries
attend to most - chosen anew each time, as the prompt's middle tokens were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thinkkv.kernels.dispatch import operation
from thinkkv.kernels.entries import states_of
from thinkkv.sdk.plan import best, pool
from thinkkv.sdk.policies import Policy
from thinkkv.sdk.store import RowGroup

SEGMENT = 64
"""Tokens that a bounded row may hold beyond its limit."""

OBSERVATION_WINDOW = 32
"""Newest queries that vote, as many as Task-KV's window over the prompt."""


class RecentQueries:
    """The newest queries of one layer, kept for the next vote."""

    def __init__(self) -> None:
        self._queries: list[torch.Tensor] = []

    def add(self, query: torch.Tensor) -> None:
        """Remember [B, Hq, Q, D] queries and forget those that the window has passed."""
        self._queries.append(query[:, :, -OBSERVATION_WINDOW:].detach())
        while sum(q.shape[2] for q in self._queries[1:]) >= OBSERVATION_WINDOW:
            del self._queries[0]

    def forget(self) -> None:
        """Start anew, where the newest queries do not line up with the newest entries."""
        self._queries.clear()

    def newest(self, count: int = OBSERVATION_WINDOW) -> torch.Tensor | None:
        """[B, Hq, L, D] with L up to the window and to ``count``; None where there are none."""
        if not self._queries:
            return None
        return torch.cat(self._queries, dim=2)[:, :, -min(OBSERVATION_WINDOW, count) :]

    def per_row(self, query_group: int, longest: int) -> torch.Tensor | None:
        """[B * n, G, L, D], as ``newest``."""
        newest = self.newest(longest)
        return None if newest is None else newest.unflatten(1, (-1, query_group)).flatten(0, 1)


def entries_to_keep(group: RowGroup, queries: torch.Tensor | None, policy: Policy, scale: float) -> torch.Tensor:
    """What a group over its limit keeps.

    Args:
        group: r rows of length T.
        queries: [r, G, L, D], the newest queries; None keeps the most recent entries.
        policy: says how many sinks and recent tokens always stay.
        scale: softmax scale.

    Returns:
        [r, limit + what a chunk brought beyond whole segments] int64, ascending entries.
    """
    assert group.limit is not None
    rows, device = len(group.index), group.keys.device
    sinks = min(policy.kept_ends[0], group.limit)
    recent = min(policy.kept_ends[1], group.limit - sinks)
    middle = group.limit - sinks - recent
    recent += (group.length - group.limit) % SEGMENT
    if queries is None:
        recent, middle = recent + middle, 0
    ends = torch.cat(
        [torch.arange(sinks, device=device), torch.arange(group.length - recent, group.length, device=device)]
    )
    kept = [ends.expand(rows, -1)]
    if middle and queries is not None:
        scores = operation("window_scores", device)(
            queries.flatten(0, 1), states_of(group.keys, queries.dtype), scale=scale
        )
        between = scores.unflatten(0, (rows, -1)).mean(dim=1)[:, sinks : group.length - recent]
        kept.append(best(pool(between, policy.pooling_width), middle, offset=sinks))
    return torch.cat(kept, dim=1).sort(dim=1).values


def rows_over_limit(groups: Sequence[RowGroup]) -> list[RowGroup]:
    """The groups that have grown a segment beyond their limit."""
    return [group for group in groups if group.limit is not None and group.length >= group.limit + SEGMENT]
