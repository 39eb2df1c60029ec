"""The operator domain ``ai.thinkkv``: what its functions have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DOMAIN = "ai.thinkkv"
VERSION = 1
OPSETS = {"": 24, "com.microsoft": 1}
"""Opsets of the bodies: 24 brings TensorScatter, which writes in place where past and present share a buffer."""


@dataclass(frozen=True)
class Overload:
    """How an operator over the heads of a layer is used.

    Args:
        packed: queries, keys and values come in one tensor, as the first of the three inputs.
        with_full: the layer has full heads, too; they come first.
        all_full: the layer has no others; TaskKVStep only.
    """

    packed: bool = False
    with_full: bool = False
    all_full: bool = False

    @property
    def name(self) -> str:
        """As nodes and definitions have it."""
        return "_".join(name for name, used in vars(self).items() if used)


OVERLOADS = tuple(Overload(packed, with_full) for packed in (False, True) for with_full in (False, True))
"""Of TaskKVAttention."""


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that are cached alike.

    Args:
        query_heads, kv_heads, head_dim: counts and size.
        scale: softmax scale.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float

    @property
    def counts(self) -> tuple[int, int, int]:
        """Heads of the queries, keys and values."""
        return self.query_heads, self.kv_heads, self.kv_heads

    @property
    def attributes(self) -> dict[str, Any]:
        """As the operators take them."""
        return {"num_heads": self.query_heads, "kv_num_heads": self.kv_heads, "scale": self.scale}
