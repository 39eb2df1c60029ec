"""The CPU path: a layer's rows block by block, each block one dense tensor for torch's own kernels.

A layer has few blocks of rows of equal length, so no call needs padding. The query group is laid along the query axis:
one key row serves all its query heads without being repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from thinkkv.kernels.arena import Arena, Block
from thinkkv.kernels.entries import entries_of, stored_states, turned_back

QUERY_BLOCK = 512
"""Queries attended at once for a chunk; bounds the mask to ``group * QUERY_BLOCK * T`` booleans."""

SHORTEST_PART = 2048
"""Entries below which splitting a row costs more than a second thread saves (measured: docs/kernels.md)."""


def compact(arena: Arena, keys: torch.Tensor, values: torch.Tensor, kept: Sequence[torch.Tensor]) -> None:
    """Fill the rows with what they keep.

    Args:
        arena: laid out for these lengths.
        keys, values: [R, N, D].
        kept: per row the int64 entries to keep, in the order to store them.
    """
    for block in arena.blocks:
        for place, row in enumerate(block.index):
            for states, stored in ((keys[row], block.keys[place]), (values[row], block.values[place])):
                target, whole = stored[: block.length], block.length == states.shape[0]
                if target.dtype != states.dtype:
                    target.copy_(entries_of(states if whole else states[kept[row]], target.dtype))
                elif whole:
                    target.copy_(states)
                else:
                    torch.index_select(states, 0, kept[row], out=target)


def append(arena: Arena, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write [R, Q, D] new tokens behind every row, in place, where every row must have room.

    The arena's own lengths are the caller's to change.
    """
    new = keys.shape[1]
    keys, values = arena.entries(keys, values)
    for block, new_keys, new_values in zip(arena.blocks, arena.split(keys), arena.split(values), strict=True):
        block.keys.narrow(1, block.length, new).copy_(new_keys)
        block.values.narrow(1, block.length, new).copy_(new_values)


def ragged_decode(
    arena: Arena, query: torch.Tensor, *, scale: float, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend ``Q`` new tokens to their rows; the rows end with these tokens.

    Args:
        arena: the rows.
        query: [R, G, Q, D], G query heads per row. Query i sees the entries before ``length - (Q - 1 - i)``; so where
            a row has received fewer tokens than the chunk is wide, its own queries are the last ones.
        scale: softmax scale.
        starts: [R, Q] int32, first entry that each query sees; None where it sees all before it.

    Returns:
        [R, G, Q, D] in query's dtype; zeros where a query sees nothing.
    """
    first = (None,) * len(arena.blocks) if starts is None else arena.split(starts)
    parts = zip(arena.blocks, arena.split(query), first, strict=True)
    out = arena.join([_attend(block, part, scale, start) for block, part, start in parts])
    return turned_back(out, arena.values.dtype)


def _attend(block: Block, query: torch.Tensor, scale: float, starts: torch.Tensor | None) -> torch.Tensor:
    in_use = (entries.narrow(1, 0, block.length) for entries in (block.keys, block.values))
    keys, values = (stored_states(entries, query.dtype) for entries in in_use)
    if query.shape[2] == 1 and starts is None and block.length:
        return _attend_token(query, keys, values, scale)
    blocks = range(0, query.shape[2], QUERY_BLOCK)
    return torch.cat([_attend_queries(query, keys, values, first, scale, starts) for first in blocks], dim=2)


def _attend_token(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One token that sees everything: [r, G, 1, D] over [r, T, D]."""
    # Rows as the batch, the query group as the queries: [r, 1, G, D] over [r, 1, T, D].
    folded = query.transpose(1, 2)
    parts = _parts(*keys.shape[:2])
    if parts == 1:
        out = scaled_dot_product_attention(folded, keys.unsqueeze(1), values.unsqueeze(1), scale=scale)
    else:
        out = _attend_in_parts(folded, keys, values, parts, scale)
    return out.transpose(1, 2)


def _parts(rows: int, length: int) -> int:
    """Into how many parts rows are split; torch gives each (row, part) to one thread."""
    threads = torch.get_num_threads()
    if rows % threads == 0 or length < 2 * SHORTEST_PART:
        return 1
    return min(threads, length // SHORTEST_PART)


def _attend_in_parts(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: int, scale: float
) -> torch.Tensor:
    """[r, 1, G, D]: split-K attention, merged by the parts' log-sum-exps."""
    width = keys.shape[1] // parts
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query.expand(-1, count, -1, -1), *(states.unflatten(1, (count, -1)) for states in piece), scale=scale
        )
        for count, *piece in (
            (parts, keys[:, : parts * width], values[:, : parts * width]),
            (1, keys[:, parts * width :], values[:, parts * width :]),
        )
        if piece[0].shape[1]
    ]
    out, sums = (torch.cat(tensors, dim=1) for tensors in zip(*found, strict=True))
    weights = torch.softmax(sums, dim=1).unsqueeze(-1)
    return (out * weights).sum(dim=1, keepdim=True).to(query.dtype)


def _attend_queries(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    scale: float,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    rows, group, new, _ = query.shape
    part = query[:, :, first : first + QUERY_BLOCK]
    width = part.shape[2]
    entry = torch.arange(keys.shape[1], device=keys.device)
    ends = torch.arange(first, first + width, device=keys.device) + (keys.shape[1] - new + 1)
    visible = (entry < ends[:, None]).expand(rows, -1, -1)
    if starts is not None:
        visible = visible & (entry >= starts[:, first : first + width, None])
    mask = visible.repeat(1, group, 1)
    folded = part.reshape(rows, group * width, -1)
    out = scaled_dot_product_attention(
        folded[:, None], keys[:, None], values[:, None], attn_mask=mask[:, None], scale=scale
    )
    return out.masked_fill(~mask.any(dim=-1)[:, None, :, None], 0)[:, 0].unflatten(1, (group, width))
