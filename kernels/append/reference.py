"""New tokens written behind the end of every cache row, one token at a time."""

from __future__ import annotations

import torch

from thinkkv.kernels.entries import entries_of


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    ring_first: torch.Tensor | None = None,
    ring_size: torch.Tensor | None = None,
) -> None:
    """Write the new tokens behind the rows' ends, in place, and add them to the rows' lengths.

    A row may have a ring: its first ``ring_first`` entries stay, the ``ring_size`` behind them hold the most recent
    tokens, the newest in the place of the oldest.

    Args:
        new_keys, new_values: [R, Q, D], any strides.
        arena_keys, arena_values: [S, D], a layer's storage, written; int8, uint8: as small entries.
        offsets: [R] int64, a row's first arena entry.
        lengths: [R] int32, tokens ever written to a row, raised; with a ring this may pass the row's entries.
        counts: [R] int32, how many of the Q tokens are real, the last ones (left padding); None: all.
        ring_first, ring_size: [R] int32, entries; size 0: the row has no ring. None: no row has.
    """
    rows, new, _ = new_keys.shape
    for row in range(rows):
        count = new if counts is None else int(counts[row])
        for token in range(new - count, new):
            slot = int(lengths[row])
            if ring_first is not None and ring_size is not None and ring_size[row] > 0:
                first, size = int(ring_first[row]), int(ring_size[row])
                slot = slot if slot < first + size else first + (slot - first) % size
            for stored, states in ((arena_keys, new_keys), (arena_values, new_values)):
                stored[offsets[row] + slot] = entries_of(states[row, token], stored.dtype)
            lengths[row] += 1
