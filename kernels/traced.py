"""The CPU path of a compiled decode step: shapes never change, so lengths are read and counted on the device.

Every row is attended to its whole capacity under a mask. ``thinkkv.kernels.grouped`` reads only what is in use, but
would have to be compiled anew for every token.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from thinkkv.kernels.arena import Arena, Block
from thinkkv.kernels.entries import stored_states, turned_back


def append(arena: Arena, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write one new token, [R, 1, D], behind every row and count it in ``arena.lengths``."""
    keys, values = arena.entries(keys, values)
    parts = zip(arena.blocks, arena.split(keys), arena.split(values), arena.split(arena.lengths), strict=True)
    for block, new_keys, new_values, lengths in parts:
        end = lengths[:1].long()
        block.keys.index_copy_(1, end, new_keys)
        block.values.index_copy_(1, end, new_values)
    arena.lengths.add_(1)


def ragged_decode(
    arena: Arena, query: torch.Tensor, *, scale: float, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """As ``thinkkv.kernels.grouped.ragged_decode`` for one new token, [R, G, 1, D]."""
    first = (None,) * len(arena.blocks) if starts is None else arena.split(starts)
    parts = zip(arena.blocks, arena.split(query), arena.split(arena.lengths), first, strict=True)
    out = arena.join([_attend(block, part, lengths[:1], scale, start) for block, part, lengths, start in parts])
    return turned_back(out, arena.values.dtype)


def _attend(
    block: Block, query: torch.Tensor, length: torch.Tensor, scale: float, starts: torch.Tensor | None
) -> torch.Tensor:
    entry = torch.arange(block.capacity, device=query.device)
    visible = (entry < length).expand(query.shape[0], -1)
    if starts is not None:
        visible = visible & (entry >= starts)
    return scaled_dot_product_attention(
        query.transpose(1, 2),
        stored_states(block.keys, query.dtype)[:, None],
        stored_states(block.values, query.dtype)[:, None],
        attn_mask=visible[:, None, None],
        scale=scale,
    ).transpose(1, 2)
