"""Task-KV's semantic separator: how far each KV head is from its layer's semantic center (arXiv:2501.15113, eq. 12-15).

The paper does not say how several query heads on one KV head are treated. By default every query head has a semantic
vector and the KV head takes the largest distance of its group; with one vector per KV head, two KV heads are always
equally far from their mean, so nothing would be decided. Both readings are options (docs/fidelity.md).
"""

from __future__ import annotations

from typing import Literal

import torch

from thinkkv.kernels.dispatch import operation
from thinkkv.sdk.plan import PromptView

Unit = Literal["query", "kv"]
Reduction = Literal["max", "mean"]


def head_distances(
    prompt: PromptView, scores: torch.Tensor, *, top: int, unit: Unit = "query", reduction: Reduction = "max"
) -> torch.Tensor:
    """L2 distance of every KV head from the layer's semantic center.

    Args:
        prompt: the layer's prompt.
        scores: [Hq, N] float32 window scores (eq. 13).
        top: t of eq. 14.
        unit: which heads have a semantic vector, query heads or KV heads (group mean of the scores).
        reduction: from the query heads' distances to the KV head's; without effect for unit "kv".

    Returns:
        [n] float32.
    """
    weights = scores if unit == "query" else prompt.per_kv_head(scores)
    vectors = operation("semantic_vector", weights.device)(weights, prompt.values, top=top)
    distances: torch.Tensor = (vectors - vectors.mean(dim=0)).norm(dim=1).unflatten(0, (prompt.kv_heads, -1))
    return distances.amax(dim=1) if reduction == "max" else distances.mean(dim=1)
