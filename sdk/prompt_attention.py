"""Attention over a whole prompt: exact, causal, and without an [N, N] mask for padding or sliding windows."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

WINDOW_BLOCK = 1024
"""Queries attended at once under a sliding window; the mask is [WINDOW_BLOCK, WINDOW_BLOCK + window]."""


def prompt_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    real: torch.Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention of a prompt to itself.

    Args:
        query: [B, Hq, N, D].
        keys, values: [B, n, N, D].
        scale: softmax scale.
        real: [B, N] bool, False where a token is padding; None where none is.
        window: each token sees itself and the ``window - 1`` before it.
        dropout: probability, in training.

    Returns:
        [B, Hq, N, D]; zeros at padding.
    """
    if real is None:
        return _causal(query, keys, values, scale, window, dropout)
    out = torch.zeros_like(query)
    for sequence, index in enumerate(real_tokens(real)):
        own = slice(sequence, sequence + 1)
        attended = _causal(query[own, :, index], keys[own, :, index], values[own, :, index], scale, window, dropout)
        out[sequence, :, index] = attended[0]
    return out


def real_tokens(real: torch.Tensor) -> list[slice | torch.Tensor]:
    """Where each sequence's tokens stand: a slice where they are contiguous, else their indices."""
    found: list[slice | torch.Tensor] = []
    for row in real:
        index = row.nonzero()[:, 0]
        first, last = (int(index[0]), int(index[-1])) if len(index) else (0, -1)
        found.append(slice(first, last + 1) if last + 1 - first == len(index) else index)
    return found


def _causal(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    grouped = query.shape[1] != keys.shape[1]
    if window is None or query.shape[2] <= window:
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    blocks = []
    for start in range(0, query.shape[2], WINDOW_BLOCK):
        stop = min(start + WINDOW_BLOCK, query.shape[2])
        first = max(0, start - window + 1)
        age = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(first, stop, device=query.device)
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                keys[:, :, first:stop],
                values[:, :, first:stop],
                attn_mask=(age >= 0) & (age < window),
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(blocks, dim=2)
