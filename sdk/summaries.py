"""Summary tokens: a few entries that stand for all tokens that a KV head evicts. Our own.

Attention Matching (arXiv:2602.16284) gives every kept entry a bias, so that together they weigh as much beside new
tokens as all did. A cache entry has no place for one, but evicted tokens may leave an entry behind: those with like
keys are a group, and each group gets one key to which reference queries pay the attention that they paid to the
group. The logarithm of that attention is nearly linear in the query, as the logit of a key is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thinkkv.sdk.reference_queries import ReferenceQueries

ROUNDS = 8
"""Of Lloyd's algorithm."""


def summarize(
    reference: ReferenceQueries,
    keys: torch.Tensor,
    values: torch.Tensor,
    evicted: torch.Tensor,
    *,
    count: int,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summaries of evicted tokens.

    A group's key k minimises the sum over queries q of w (q k scale - L)^2, and a ridge towards the mean of the group's
    keys; L is the logarithm of the attention to the group, not normalised, and w its share of all attention.

    Args:
        reference: queries, of what does not choose the tokens itself: these weigh more for others.
        keys, values: [N, D] of one KV head.
        evicted: [E] int64 positions, one at least.
        count: of groups, at most.
        ridge: above 0, in units of what a mean direction of the keys weighs in the sum.

    Returns:
        [S] int64, in the places of which evicted tokens the summaries stand: of those nearest to the middle of their
        groups; [S, D] float32 keys; [S, D] float32 values, the group's mean by attention. S <= count.
    """
    group, middle = grouped(keys[evicted].float(), count)
    order = group.argsort(stable=True)
    evicted, sizes = evicted[order], group.bincount().tolist()
    own = keys[evicted].float().split(sizes)
    nearest = [(keys - mean).norm(dim=1).argmin() for keys, mean in zip(own, middle, strict=True)]
    places = torch.stack([mine[at] for mine, at in zip(evicted.split(sizes), nearest, strict=True)])
    fitted, taken = _fitted(reference, own, middle, ridge)
    parts = zip(taken, values[evicted].float().split(sizes), strict=True)
    return places, fitted, torch.stack([(weight @ mine) / weight.sum() for weight, mine in parts])


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
    reference: ReferenceQueries, own: Sequence[torch.Tensor], middle: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """[S, D] a key for each group; per group [n] float32 attention to each of its tokens, above 0."""
    tiny = torch.finfo(middle.dtype).tiny
    sizes, evicted = [len(keys) for keys in own], torch.cat(list(own))
    taken = torch.full_like(evicted[:, 0], tiny)
    groups, dim = middle.shape
    gram, missed = middle.new_zeros(groups * dim, dim), torch.zeros_like(middle)
    for part in reference.parts():
        shares = (part.scaled @ evicted.T).sub_(part.weighed[:, None]).exp_()
        taken += shares.sum(dim=0)
        of_group = torch.stack([mine.sum(dim=1) for mine in shares.split(sizes, dim=1)], dim=1)
        logit = of_group.clamp(min=tiny).log() + part.weighed[:, None]
        weighed = of_group[:, :, None] * part.scaled[:, None]
        gram.addmm_(weighed.flatten(1).T, part.scaled)
        missed += (weighed * (logit - part.scaled @ middle.T)[:, :, None]).sum(dim=0)
    gram = gram.unflatten(0, (groups, dim))
    weight = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=tiny)
    # Each system in its own unit, as attention to a group may be next to nothing.
    system = gram / weight[:, None, None] + ridge * torch.eye(dim, device=middle.device)
    return middle + torch.linalg.solve(system, missed / weight[:, None]), taken.split(sizes)
