"""PyramidKV: SnapKV whose budget shrinks from the bottom layer to the top (arXiv:2406.02069)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, even_layers
from thinkkv.sdk.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with arithmetically decreasing layer budgets.

    Args:
        beta: the top layer's voted tokens are an average layer's divided by beta.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: int = 20

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        """An arithmetic series around the even budget, as steep as every layer allows."""
        even = even_layers(layers, budget)
        steepness = min(self._steepest(layer, share) for layer, share in zip(layers, even, strict=True))
        slopes = (_slope(step, len(layers)) for step in range(len(layers)))
        return [LayerBudget(int(share.tokens + slope * steepness)) for share, slope in zip(even, slopes, strict=True)]

    def _steepest(self, layer: LayerPrompt, share: LayerBudget) -> float:
        """Tokens of all heads that the bottom layer may have above the even share, and the top layer below it."""
        voted = share.tokens - self.observation_window * layer.kv_heads
        room = layer.visible * layer.kv_heads - share.tokens
        return min(voted - voted / self.beta, room)


def _slope(step: int, layers: int) -> float:
    """+1 at the bottom layer, -1 at the top, 0 on average."""
    return 1 - 2 * step / (layers - 1) if layers > 1 else 0.0
