"""One ranking of the tokens of all KV heads and layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def keep_best(certain: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], tokens: int) -> tuple[torch.Tensor, ...]:
    """What is certain, and the best of all the rest.

    Args:
        certain: per layer [n, N] bool, what is kept whatever its score.
        scores: per layer [n, N] float32, higher keeps more.
        tokens: to be kept in all; those that are certain may be more.

    Returns:
        Per layer [n, N] bool.
    """
    kept = torch.cat([layer.flatten() for layer in certain])
    ranked = torch.cat([layer.flatten() for layer in scores]).masked_fill(kept, float("-inf"))
    left = min(max(0, tokens - int(kept.sum())), int((~kept).sum()))
    kept[ranked.topk(left).indices] = True
    parts = kept.split([layer.numel() for layer in certain])
    return tuple(part.view_as(layer) for part, layer in zip(parts, certain, strict=True))
