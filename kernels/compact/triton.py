"""The kept tokens of a prompt gathered into the cache rows: K and V of all rows of a layer in one launch."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from thinkkv.kernels.variant import Variant

TILE_BYTES = 8192
"""Bytes of K, and of V, that a program of four warps copies: 64 a thread, four 16-byte loads each."""


@triton.jit
def compact_rows(
    p_source_keys: tl.tensor,
    p_source_values: tl.tensor,
    p_kept: tl.tensor,
    p_starts: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_offsets: tl.tensor,
    stride_key_row: tl.tensor,
    stride_key_token: tl.tensor,
    stride_value_row: tl.tensor,
    stride_value_token: tl.tensor,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    i_block, i_row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, stop = tl.load(p_starts + i_row), tl.load(p_starts + i_row + 1)
    begin = i_block * BLOCK_T
    if begin >= stop - start:
        return
    entry = tl.load(p_offsets + i_row)
    o_entry = begin + tl.arange(0, BLOCK_T)
    m_entry = o_entry < stop - start
    # [BLOCK_T]
    b_kept = tl.load(p_kept + start + o_entry, mask=m_entry, other=0)

    o_d = tl.arange(0, PADDED_SIZE)
    m_keys = m_entry[:, None] & (o_d < KEY_SIZE)[None, :]
    m_values = m_entry[:, None] & (o_d < VALUE_SIZE)[None, :]
    # [BLOCK_T, PADDED_SIZE]
    o_keys = i_row * stride_key_row + b_kept * stride_key_token
    b_keys = tl.load(p_source_keys + o_keys[:, None] + o_d[None, :], mask=m_keys)
    # [BLOCK_T, PADDED_SIZE]
    o_values = i_row * stride_value_row + b_kept * stride_value_token
    b_values = tl.load(p_source_values + o_values[:, None] + o_d[None, :], mask=m_values)
    o_entry += entry
    tl.store(p_keys + o_entry[:, None] * KEY_SIZE + o_d[None, :], b_keys, mask=m_keys)
    tl.store(p_values + o_entry[:, None] * VALUE_SIZE + o_d[None, :], b_values, mask=m_values)


def block_tokens(dim: int, element_size: int) -> int:
    """Tokens that a program copies."""
    return TILE_BYTES // (triton.next_power_of_2(dim) * element_size)


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
        keys, values: [R, N, D], a prompt's K and V, any strides; or small entries of each their own size.
        kept: [total] int64, the kept positions of all rows, one row after another.
        starts: [R + 1] int64, row r's positions are ``kept[starts[r] : starts[r + 1]]``.
        arena_keys, arena_values: [S, D] contiguous, a layer's storage, written.
        offsets: [R] int64, a row's first arena entry.
        longest: upper bound of the rows' kept tokens, known to the host: plans the grid without waiting for the
            device. None: N, which no row of distinct positions passes; programs behind a row's end leave at once.
    """
    rows, tokens, dim = keys.shape
    largest = max(dim, values.shape[2])
    longest = tokens if longest is None else longest
    if rows == 0 or longest == 0:
        return
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    block = block_tokens(largest, keys.element_size())
    compact_rows[triton.cdiv(longest, block), rows](
        keys,
        values,
        kept,
        starts,
        arena_keys,
        arena_values,
        offsets,
        *keys.stride()[:2],
        *values.stride()[:2],
        KEY_SIZE=dim,
        VALUE_SIZE=values.shape[2],
        PADDED_SIZE=triton.next_power_of_2(largest),
        BLOCK_T=block,
        num_warps=4,
        num_stages=1,
    )


def variants() -> list[Variant]:
    """Every dtype and head dimension."""
    sizes = {"fp16": 2, "bf16": 2, "fp32": 4}
    return [compact_variant(dtype, dim, sizes[dtype]) for dtype, dim in product(sizes, (64, 80, 96, 128, 256))]


def compact_variant(dtype: str, dim: int, element_size: int) -> Variant:
    """``compact_rows`` over rows whose strides are multiples of 16 elements."""
    block = block_tokens(dim, element_size)
    padded = triton.next_power_of_2(dim)
    constexprs = {"KEY_SIZE": dim, "VALUE_SIZE": dim, "PADDED_SIZE": padded, "BLOCK_T": block}
    sources = dict.fromkeys(("p_source_keys", "p_source_values"), f"*{dtype}")
    indices = {"p_kept": "*i64", "p_starts": "*i64"}
    arenas = {"p_keys": f"*{dtype}", "p_values": f"*{dtype}", "p_offsets": "*i64"}
    strides = dict.fromkeys(("stride_key_row", "stride_key_token", "stride_value_row", "stride_value_token"), "i32")
    arguments = sources | indices | arenas | strides
    return Variant(
        operation="compact",
        name=f"compact {dtype} D{dim} T{block}",
        kernel=compact_rows,
        signature=arguments | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=frozenset(arguments),
        num_warps=4,
        num_stages=1,
        streams=True,
    )
