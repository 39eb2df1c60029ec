"""Semantic vectors of attention heads (Task-KV eq. 14-15), in plain torch."""

from __future__ import annotations

import torch


def semantic_vector(weights: torch.Tensor, values: torch.Tensor, *, top: int) -> torch.Tensor:
    """Weighted sum of the values of each head's most attended tokens, not renormalised.

    Args:
        weights: [H, N] float32 attention weights; H is a multiple of n, row h reads KV head ``h // (H / n)``.
        values: [n, N, D].
        top: t, how many tokens count; all of them where N is smaller.

    Returns:
        [H, D] float32: ``v' = C[I] @ V[I]`` with ``I = topk(C, t)``.
    """
    heads, tokens = weights.shape
    chosen, index = weights.topk(min(top, tokens), dim=-1)
    owner = torch.arange(heads, device=values.device) // (heads // values.shape[0])
    picked = values[owner[:, None], index].float()
    return torch.einsum("ht,htd->hd", chosen, picked)
