"""Sizes that ``decode.h`` is made for; for those who load no torch."""

from __future__ import annotations

LANES, MAX_GROUP, MAX_DIM = 8, 16, 256


def serves(group: int, dim: int) -> bool:
    """Whether it attends to so many query heads a KV head, and heads of such a size."""
    return group <= MAX_GROUP and dim <= MAX_DIM and dim % LANES == 0
