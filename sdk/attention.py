"""The attention function and the mask that a patched model is given, through transformers' public registries.

The attention module hands its new keys and values to the cache and passes on what the cache returns, so the function
here receives the layer's store itself. Without a thinkkv cache (training, ``use_cache=False``, another cache) it is
the stock SDPA attention with the stock mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from thinkkv.patches.errors import UnsupportedGenerationError
from thinkkv.sdk.layer import NewTokens

NAME = "thinkkv"
"""Name of the attention implementation."""


def register_attention() -> None:
    """Make ``attn_implementation="thinkkv"`` known to transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, deferred_mask)


class DeferredMask:
    """The padding of a batch, and the stock SDPA mask if somebody asks for it.

    A thinkkv cache needs the padding only; the [B, 1, Q, T] mask would be gigabytes for a long prompt.

    Args:
        padding: [B, T] bool, False at padding; None where there is none.
        build: makes the stock mask.
    """

    def __init__(self, padding: torch.Tensor | None, build: Callable[[], torch.Tensor | None]) -> None:
        self.padding = None if padding is None or bool(padding.all()) else padding
        self._build = build

    @cached_property
    def dense(self) -> torch.Tensor | None:
        """What stock SDPA attention would have been given."""
        return self._build()

    def real(self, new: int) -> torch.Tensor | None:
        """[B, Q] bool of the newest ``new`` tokens, None where all of them are real."""
        if self.padding is None:
            return None
        newest = self.padding[:, -new:]
        return None if bool(newest.all()) else newest


def deferred_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> DeferredMask:
    """Mask function with the signature of transformers' own (``sdpa_mask``)."""
    return DeferredMask(attention_mask, partial(sdpa_mask, *args, **(kwargs | {"attention_mask": attention_mask})))


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | NewTokens,
    value: torch.Tensor | NewTokens,
    attention_mask: DeferredMask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function with transformers' signature.

    Args:
        module: the attention module.
        query: [B, Hq, Q, D].
        key, value: from a thinkkv cache: its NewTokens; else [B, n, T, D].
        attention_mask: what ``deferred_mask`` made, or a mask the user prepared.
        scaling: softmax scale.
        dropout: probability, in training.

    Returns:
        [B, Q, Hq, D], and None for the attention weights.
    """
    if isinstance(key, NewTokens):
        out = key.layer.attend(
            query,
            key.keys,
            key.values,
            scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
            real=None if torch.compiler.is_compiling() else _real(attention_mask, query.shape[2]),
            dropout=dropout,
        )
        return out.transpose(1, 2), None
    assert isinstance(value, torch.Tensor)
    mask = attention_mask.dense if isinstance(attention_mask, DeferredMask) else attention_mask
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _real(mask: DeferredMask | torch.Tensor | None, new: int) -> torch.Tensor | None:
    if mask is None or isinstance(mask, DeferredMask):
        return None if mask is None else mask.real(new)
    raise UnsupportedGenerationError(
        "a prepared 4-D attention mask cannot be applied to a compressed cache - "
        "pass the 2-D padding mask, or use_cache=False"
    )
