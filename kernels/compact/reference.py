"""The kept tokens of a prompt gathered into the cache rows, one row at a time."""

from __future__ import annotations

import torch


def compact(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    starts: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    offsets: torch.Tensor,
    *,
    longest: int | None = None,
) -> None:
    """Gather every row's kept tokens, in order, into its arena entries, in place.

    Args:
        keys, values: [R, N, D], a prompt's K and V.
        kept: [total] int64, the kept positions of all rows, one row after another.
        starts: [R + 1] int64, row r's positions are ``kept[starts[r] : starts[r + 1]]``.
        arena_keys, arena_values: [S, D], a layer's storage, written.
        offsets: [R] int64, a row's first arena entry.
        longest: upper bound of the rows' kept tokens; plans the kernel's grid, nothing here depends on it.
    """
    for row in range(keys.shape[0]):
        positions = kept[starts[row] : starts[row + 1]]
        entries = slice(int(offsets[row]), int(offsets[row]) + len(positions))
        arena_keys[entries] = keys[row, positions]
        arena_values[entries] = values[row, positions]
