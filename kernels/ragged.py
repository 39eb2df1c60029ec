"""The GPU path: every operation takes all rows of a layer in one launch, by an offset and a length per row.

Each function gets the kernel to launch: the Triton one, or the reference beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from thinkkv.kernels.arena import Arena

Kernel = Callable[..., Any]


def compact(
    arena: Arena, keys: torch.Tensor, values: torch.Tensor, kept: Sequence[torch.Tensor], *, kernel: Kernel
) -> None:
    """As ``thinkkv.kernels.grouped.compact``."""
    keys, values = arena.entries(keys, values)
    counts = torch.tensor([0, *(len(entries) for entries in kept)], device=keys.device)
    longest = max(map(len, kept))
    chosen = torch.cat(list(kept))
    with torch.cuda.device_of(keys):  # where a model is spread over several GPUs, Triton launches on the current one
        kernel(keys, values, chosen, counts.cumsum(0), arena.keys, arena.values, arena.offsets, longest=longest)


def append(arena: Arena, keys: torch.Tensor, values: torch.Tensor, *, kernel: Kernel) -> None:
    """As ``thinkkv.kernels.grouped.append``, and ``arena.lengths`` counts the entries in the same launch."""
    with torch.cuda.device_of(keys):
        kernel(keys, values, arena.keys, arena.values, arena.offsets, arena.lengths)


def ragged_decode(
    arena: Arena, query: torch.Tensor, *, scale: float, starts: torch.Tensor | None = None, kernel: Kernel
) -> torch.Tensor:
    """As ``thinkkv.kernels.grouped.ragged_decode``."""
    rows = arena.keys, arena.values, arena.offsets, arena.lengths
    with torch.cuda.device_of(query):
        out: torch.Tensor = kernel(query, *rows, scale=scale, longest=arena.longest, starts=starts)
    return out
