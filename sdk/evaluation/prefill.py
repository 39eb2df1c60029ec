"""One forward over a batch of prompts, from which the caches of many policies are filled.

What a prompt's queries, keys and values are does not depend on what is evicted afterwards, so the compared settings
share them: the same prompt costs one prefill, and no setting is ahead by luck of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.layer import HeterogeneousLayer


class _RecordingLayer(HeterogeneousLayer):
    """Notes what it would compact, and stores nothing."""

    prompt: tuple[Any, ...]

    def compact(self, *prompt: Any) -> None:
        self.prompt = prompt


@dataclass(frozen=True)
class Prefill:
    """Prompts that were attended to, before any eviction.

    Args:
        layers: of the recording.
        mask: [B, N] int64, 0 at left padding.
        logits: [B, V] after the last token.
    """

    layers: Sequence[_RecordingLayer]
    mask: torch.Tensor
    logits: torch.Tensor

    def cache(self, compression: Compression) -> HeterogeneousCache:
        """A cache as this compression would have left it after the prompts."""
        cache = HeterogeneousCache(compression)
        for layer, recorded in zip(cache.layers, self.layers, strict=True):
            layer.compact(*recorded.prompt)
            layer.seen = recorded.seen
        return cache


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[Sequence[int]], compression: Compression) -> Prefill:
    """Attend to a batch of prompts.

    Args:
        model: patched, by whatever policy.
        prompts: token ids, of different lengths.
        compression: any of this model, for the geometry of its layers.
    """
    ids, mask = left_padded(prompts, model.device)
    cache = HeterogeneousCache(compression)
    layers = [_RecordingLayer(layer.index, compression) for layer in cache.layers]
    cache.layers = layers  # type: ignore[assignment]
    out = model(
        ids,
        attention_mask=mask,
        position_ids=positions(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefill(layers, mask, out.logits[:, -1])


def left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N] token ids and their mask, 0 where a row is shorter than the longest."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: place of each token among its row's real ones."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
