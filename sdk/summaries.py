"""Summary tokens: a few entries that stand for all tokens that a KV head evicts. Our own.

Attention Matching (arXiv:2602.16284) gives every kept entry a bias, so that together they weigh as much beside new
tokens as all did. A cache entry has no place for one, but evicted tokens may leave an entry behind: those with like
keys are a group, and each group gets one key to which the queries of a second reading pay the attention that they paid
to the group. The logarithm of that attention is nearly linear in the query, as the logit of a key is.
"""

from __future__ import annotations

import torch

ROWS = 1024
"""Queries whose attention is in memory at once."""

ROUNDS = 8
"""Of Lloyd's algorithm."""


def summarize(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    evicted: torch.Tensor,
    *,
    count: int,
    scale: float,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summaries of evicted tokens.

    A group's key k minimises the sum over queries q of w (q k scale - L)^2, and a ridge towards the mean of the group's
    keys; L is the logarithm of the attention to the group, not normalised, and w its share of all attention.

    Args:
        queries: [R, D] of a second reading.
        keys, values: [N, D] of one KV head.
        evicted: [E] int64 positions, one at least.
        count: of groups, at most.
        scale: softmax scale.
        ridge: above 0, in units of what a mean direction of the keys weighs in the sum.

    Returns:
        [S] int64, in the places of which evicted tokens the summaries stand: of those nearest to the middle of their
        groups; [S, D] float32 keys; [S, D] float32 values, the group's mean by attention. S <= count.
    """
    own = keys[evicted].float()
    group, middle = grouped(own, count)
    apart = torch.cdist(own, middle)
    apart[group[:, None] != torch.arange(len(middle), device=group.device)] = torch.inf
    fitted, taken = _fitted(queries.float() * scale, keys.float(), evicted, group, middle, ridge)
    weighed = torch.zeros_like(middle).index_add_(0, group, taken[:, None] * values[evicted].float())
    attention = torch.zeros_like(middle[:, 0]).index_add_(0, group, taken)
    return evicted[apart.argmin(dim=0)], fitted, weighed / attention[:, None]


def grouped(points: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm from evenly spaced points; no group is empty.

    Args:
        points: [E, D].
        count: of groups, at most.

    Returns:
        [E] int64 group of each point; [S, D] their means.
    """
    start = torch.arange(min(count, len(points)), device=points.device) * len(points) // min(count, len(points))
    middle = points[start]
    for _ in range(ROUNDS):
        group = torch.cdist(points, middle).argmin(dim=1)
        _, group, size = group.unique(return_inverse=True, return_counts=True)
        middle = points.new_zeros(len(size), points.shape[1]).index_add_(0, group, points) / size[:, None]
    return group, middle


def _fitted(
    queries: torch.Tensor,
    keys: torch.Tensor,
    evicted: torch.Tensor,
    group: torch.Tensor,
    middle: torch.Tensor,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, D] a key for each group; [E] float32 attention to each evicted token, above 0; queries are scaled."""
    groups, dim = middle.shape
    gram, missed = middle.new_zeros(groups, dim, dim), middle.new_zeros(groups, dim)
    taken = torch.full_like(group, torch.finfo(keys.dtype).tiny, dtype=keys.dtype)
    for part in queries.split(ROWS):
        scores = part @ keys.T
        shares = (scores[:, evicted] - scores.logsumexp(dim=1, keepdim=True)).exp()
        taken += shares.sum(dim=0)
        for number in range(groups):
            mine = group == number
            logit = scores[:, evicted[mine]].logsumexp(dim=1)
            weighed = part * shares[:, mine].sum(dim=1, keepdim=True)
            gram[number] += weighed.T @ part
            missed[number] += weighed.T @ (logit - part @ middle[number])
    weight = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(keys.dtype).tiny)
    # Each system in its own unit, as attention to a group may be next to nothing.
    system = gram / weight[:, None, None] + ridge * torch.eye(dim, device=keys.device)
    return middle + torch.linalg.solve(system, missed / weight[:, None]), taken
