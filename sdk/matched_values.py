"""Values that make up for evicted tokens: attention to what is stored comes out as attention to all would.

Attention Matching (arXiv:2602.16284) finds a small cache whose attention outputs are those of the whole one for a set
of reference queries. Its values are the solution of a least-squares problem, taken over here with the queries of a
second reading (``rehearsal.py``) and with a ridge towards the values that are there, so that what no query tells about
is left as it is. The paper's biases are left out: a cache entry has no place for them (``summaries.py`` has another
way).
"""

from __future__ import annotations

import torch

from thinkkv.sdk.plan import Entries
from thinkkv.sdk.reference_queries import ReferenceQueries


def matched_values(reference: ReferenceQueries, stored: Entries, *, recent: int, ridge: float) -> torch.Tensor:
    """The values that minimise |A V - O|^2 + ridge |V - V0|^2, but for those of the most recent entries.

    These keep their own: a second reading hardly looks at what stands right before it, what follows the prompt does.

    Args:
        reference: queries; O [R, D] is their attention to all tokens, A [R, S] the weights of what is stored.
        stored: [S, D] keys and V0 of one KV head, by position.
        recent: so many of the last of them keep their values.
        ridge: above 0; that many full looks of a query at an entry weigh as much as the entry's own value.

    Returns:
        [S, D] float32.
    """
    keys, own = (states.float() for states in stored)
    free = max(0, len(keys) - recent)
    gram = ridge * torch.eye(free, device=keys.device)
    missed = torch.zeros(free, own.shape[1], device=keys.device)
    for part in reference.parts():
        weights = (part.scaled @ keys.T).softmax(dim=-1)
        changed = weights[:, :free]
        gram.addmm_(changed.T, changed)
        missed.addmm_(changed.T, part.outputs - weights @ own)
    change = torch.cholesky_solve(missed, torch.linalg.cholesky(gram))
    return torch.cat([own[:free] + change, own[free:]])
