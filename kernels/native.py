"""The CPU path with a kernel in C for the step that counts: one new token, all rows of a layer in one call.

It needs no block of equal rows and reads lengths when it runs, so a compiled step is the same code. Everything else is
the torch path's: prompts, chunks of several tokens, gradients, sizes that the kernel is not made for.
"""

from __future__ import annotations

import torch

from thinkkv.kernels import grouped
from thinkkv.kernels.append import native as quantizing
from thinkkv.kernels.arena import Arena
from thinkkv.kernels.ragged_decode import native as kernel


def append(arena: Arena, keys: torch.Tensor, values: torch.Tensor) -> None:
    """As ``thinkkv.kernels.grouped.append``, and ``arena.lengths`` counts the entries."""
    new = keys.shape[1]
    small = arena.keys.dtype == torch.int8
    if new == 1 and small and not torch.compiler.is_compiling() and quantizing.takes(keys):
        quantizing.append(keys[:, 0], values[:, 0], arena.keys, arena.values, arena.offsets, arena.lengths)
    elif new == 1:
        ends = arena.offsets + arena.lengths
        new_keys, new_values = arena.entries(keys[:, 0], values[:, 0])
        arena.keys.index_copy_(0, ends, new_keys)
        arena.values.index_copy_(0, ends, new_values)
    else:
        grouped.append(arena, keys, values)
    arena.lengths.add_(new)


def ragged_decode(
    arena: Arena, query: torch.Tensor, *, scale: float, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """As ``thinkkv.kernels.grouped.ragged_decode``."""
    if not kernel.takes(query) or (torch.is_grad_enabled() and query.requires_grad):
        return grouped.ragged_decode(arena, query, scale=scale, starts=starts)
    attend = kernel.operator if torch.compiler.is_compiling() else kernel.ragged_decode
    return attend(query, arena.keys, arena.values, arena.offsets, arena.lengths, starts, scale)
