"""Values that make up for evicted tokens: attention to the kept ones comes out as attention to all would.

Attention Matching (arXiv:2602.16284) finds a small cache whose attention outputs are those of the whole one for a set
of reference queries. Its values are the solution of a least-squares problem, taken over here with the queries of a
second reading (``rehearsal.py``) and with a ridge towards the tokens' own values, so that what no query tells about is
left as it is. The paper's biases, which make up for the lost weight beside new tokens, are left out: a cache entry has
no place for them.
"""

from __future__ import annotations

import torch

ROWS = 1024
"""Queries whose attention is in memory at once."""


def matched_values(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    *,
    recent: int,
    scale: float,
    ridge: float,
) -> torch.Tensor:
    """The values that minimise |A V - O|^2 + ridge |V - V0|^2, but for those of the most recent tokens.

    These keep their own: a second reading hardly looks at what stands right before it, what follows the prompt does.

    Args:
        queries: [R, D], of which O [R, D] is the attention to all tokens, and A [R, S] the weights of the kept alone.
        keys, values: [N, D] of one KV head.
        kept: [S] int64, positions, ascending; V0 are their own values.
        recent: so many of the last of them keep these.
        scale: softmax scale.
        ridge: above 0; that many full looks of a query at a token weigh as much as the token's own value.

    Returns:
        [S, D] float32.
    """
    others = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    others[kept] = False
    order = torch.cat([kept, others.nonzero()[:, 0]])
    keys, values = keys[order].float(), values[order].float()
    count, free = len(kept), max(0, len(kept) - recent)
    gram = ridge * torch.eye(free, device=keys.device)
    missed = torch.zeros(free, values.shape[1], device=keys.device)
    for part in queries.float().split(ROWS):
        scores = (part @ keys.T).mul_(scale)
        outputs = scores.softmax(dim=-1) @ values
        weights = scores[:, :count].softmax(dim=-1)
        changed = weights[:, :free]
        gram.addmm_(changed.T, changed)
        missed.addmm_(changed.T, outputs - weights @ values[:count])
    change = torch.cholesky_solve(missed, torch.linalg.cholesky(gram))
    return torch.cat([values[:free] + change, values[free:count]])
