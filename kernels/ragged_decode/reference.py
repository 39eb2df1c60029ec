"""Attention of new tokens over cache rows of different length, one query at a time: what the kernels must equal."""

from __future__ import annotations

import torch

from thinkkv.kernels.entries import states_of


def ragged_decode(
    query: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    longest: int,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend Q new tokens to cache rows of different length; a row ends with these tokens.

    Args:
        query: [R, G, Q, D], G query heads per row.
        arena_keys, arena_values: [S, D], a layer's storage; or small entries (``thinkkv.kernels.entries``).
        offsets: [R] int64, a row's first arena entry.
        lengths: [R] int32, entries in use with the Q new tokens, the row's last: query i sees the entries below
            ``length - (Q - 1 - i)``.
        scale: softmax scale, usually ``D ** -0.5``.
        longest: upper bound of ``lengths``; plans the kernels' splits, nothing here depends on it.
        starts: [R, Q] int32, the first entry that a query may see (a sliding window); None: all from 0.

    Returns:
        [R, G, Q, D] in query's dtype; a query that sees nothing gives zeros. Computed in float32.
    """
    rows, _, new, _ = query.shape
    out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    for row in range(rows):
        for token in range(new):
            start = 0 if starts is None else max(0, int(starts[row, token]))
            end = int(lengths[row]) - (new - 1 - token)
            if start >= end:
                continue
            seen = slice(int(offsets[row]) + start, int(offsets[row]) + end)
            logits = query[row, :, token].float() @ states_of(arena_keys[seen], torch.float32).float().T * scale
            out[row, :, token] = torch.softmax(logits, dim=-1) @ states_of(arena_values[seen], torch.float32).float()
    return out.to(query.dtype)
