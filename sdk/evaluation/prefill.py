"""One forward over a batch of prompts, from which the caches of many policies are filled.

What a prompt's queries, keys and values are does not depend on what is evicted afterwards, so the compared settings
share them: the same prompt costs one prefill, and no setting is ahead by luck of rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.holding import HoldingLayer
from thinkkv.sdk.rehearsal import rehearse
from thinkkv.sdk.whole_prompt import WholePrompt


@dataclass(frozen=True)
class Prefill:
    """Prompts that were attended to, before any eviction.

    Args:
        layers: what each of them computed.
        mask: [B, N] int64, 0 at left padding.
        logits: [B, V] after the last token.
    """

    layers: Sequence[WholePrompt]
    mask: torch.Tensor
    logits: torch.Tensor

    def cache(self, compression: Compression) -> HeterogeneousCache:
        """A cache as this compression would have left it after the prompts."""
        cache = HeterogeneousCache(compression)
        cache.compress(list(self.layers))
        for layer in cache.layers:
            layer.seen = self.mask.shape[1]
        return cache


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[Sequence[int]], compressions: Collection[Compression]) -> Prefill:
    """Attend to a batch of prompts.

    Args:
        model: patched, by whatever policy.
        prompts: token ids, of different lengths.
        compressions: what caches will be asked for; the prompts are read again if a policy among them needs it.
    """
    ids, mask = left_padded(prompts, model.device)
    one = next(iter(compressions))
    cache = HeterogeneousCache(one)
    layers = [HoldingLayer(index, one) for index in range(len(one.shapes))]
    cache.layers = [*layers]
    inputs = {"input_ids": ids, "attention_mask": mask}
    out = model(**inputs, position_ids=positions(mask), past_key_values=cache, use_cache=True, logits_to_keep=1)
    policies = [compression.policy for compression in compressions]
    if any(policy.rehearses for policy in policies):
        queries = max(policy.reread_queries for policy in policies)
        shuffled = any(policy.shuffles for policy in policies)
        rehearse(model.base_model, inputs, cache, held_queries=queries, shuffled=shuffled)
    return Prefill([layer.held for layer in layers if layer.held is not None], mask, out.logits[:, -1])


def left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, N] token ids and their mask, 0 where a row is shorter than the longest."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """[B, N] int64: place of each token among its row's real ones."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
