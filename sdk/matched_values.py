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
    weights = (reference.scaled @ keys.T).softmax(dim=-1)
    looks, missed = weights[:, :free], reference.outputs - weights @ own
    return torch.cat([own[:free] + _least_squares(looks, missed, ridge), own[free:]])


def _least_squares(looks: torch.Tensor, missed: torch.Tensor, ridge: float) -> torch.Tensor:
    """[S, D] the X that minimises |A X - M|^2 + ridge |X|^2, for A [R, S] and M [R, D].

    As the solution of S equations or of R, whichever are fewer, so that a long prompt costs no more than its length.
    """
    fewer = looks.mT if looks.shape[1] <= looks.shape[0] else looks
    gram = fewer @ fewer.mT
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    if fewer is looks:
        return looks.mT @ torch.cholesky_solve(missed, factor)
    return torch.cholesky_solve(looks.mT @ missed, factor)
