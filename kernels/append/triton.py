"""New tokens written behind the end of every cache row: K, V and lengths of a layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from thinkkv.kernels.entries import BITS, is_turned
from thinkkv.kernels.hadamard_triton import turned
from thinkkv.kernels.variant import SMALL_FORMS, STORED, Variant

BLOCK_TOKENS = 16
"""Tokens that a program copies at once; a decode step has one."""


@triton.jit
def rounded(b_numbers: tl.tensor) -> tl.tensor:
    """Numbers below 2^22 as the nearest integers, ties to even: 1.5 * 2^23 more, they have no place for fractions."""
    return (b_numbers + 12582912.0) - 12582912.0


@triton.jit
def store_entries(
    p_entries: tl.tensor,
    o_entry: tl.tensor,
    o_d: tl.tensor,
    b_states: tl.tensor,
    m_tile: tl.tensor,
    m_entry: tl.tensor,
    DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
) -> None:
    """[BLOCK_T, PADDED_DIM] states, zeros beyond DIM, as they are or as int8 entries (``thinkkv.kernels.entries``)."""
    if QUANTIZED:
        b_states = b_states.to(tl.float32)
        # [BLOCK_T]
        b_scales = tl.maximum(tl.max(tl.abs(b_states), axis=1) / 127, 1.1754943508222875e-38)
        b_scales += tl.sum(b_states * 0.0, axis=1)  # what is no number is not hidden
        b_numbers = rounded(tl.div_rn(b_states, b_scales[:, None])).to(tl.int8)
        o_byte = o_entry * (DIM + 4)
        tl.store(p_entries + o_byte[:, None] + o_d[None, :], b_numbers, mask=m_tile)
        tl.store((p_entries + o_byte + DIM).to(tl.pointer_type(tl.float32)), b_scales, mask=m_entry)
    else:
        tl.store(p_entries + o_entry[:, None] * DIM + o_d[None, :], b_states, mask=m_tile)


@triton.jit
def store_turned_entries(
    p_entries: tl.tensor,
    o_entry: tl.tensor,
    b_states: tl.tensor,
    m_tile: tl.tensor,
    m_entry: tl.tensor,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """[BLOCK_T, PADDED_DIM] states, zeros beyond DIM, as int4 or int5 entries (``thinkkv.kernels.entries``)."""
    HALF: tl.constexpr = DIM // 2
    STEPS: tl.constexpr = 2**BITS - 1
    NUMBERS: tl.constexpr = DIM * BITS // 8  # bytes
    b_states = turned(b_states.to(tl.float32), BLOCK_T, DIM, PADDED_DIM)
    # [BLOCK_T]
    b_least = tl.min(tl.where(m_tile, b_states, float("inf")), axis=1)
    b_most = tl.max(tl.where(m_tile, b_states, float("-inf")), axis=1)
    b_least += tl.sum(b_states * 0.0, axis=1)  # what is no number is not hidden
    b_least = b_least.to(tl.float16)
    b_step = tl.maximum((b_most - b_least.to(tl.float32)) / STEPS, 5.960464477539063e-08).to(tl.float16)
    # [BLOCK_T, PADDED_DIM]
    b_steps = tl.div_rn(b_states - b_least.to(tl.float32)[:, None], b_step.to(tl.float32)[:, None])
    b_numbers = tl.minimum(tl.maximum(rounded(b_steps), 0.0), STEPS).to(tl.uint8)
    # [BLOCK_T, PADDED_DIM / 2]
    o_byte = tl.arange(0, PADDED_DIM // 2)
    o_low = tl.broadcast_to(tl.minimum(o_byte, HALF - 1)[None, :], [BLOCK_T, PADDED_DIM // 2])
    b_bytes = (tl.gather(b_numbers, o_low, axis=1) & 15) | (tl.gather(b_numbers, o_low + HALF, axis=1) << 4)
    p_entry = p_entries.to(tl.pointer_type(tl.uint8)) + o_entry * (NUMBERS + 4)
    tl.store(p_entry[:, None] + o_byte[None, :], b_bytes, mask=m_entry[:, None] & (o_byte < HALF)[None, :])
    if BITS == 5:
        # Bits of neighbours, then of pairs, then of fours come together in a byte.
        b_fifth = b_numbers >> 4
        for stage in tl.static_range(3):
            b_even, b_odd = tl.split(tl.reshape(b_fifth, [BLOCK_T, PADDED_DIM >> (stage + 1), 2]))
            b_fifth = b_even | (b_odd << (1 << stage))
        o_eight = tl.arange(0, PADDED_DIM // 8)
        m_eight = m_entry[:, None] & (o_eight < DIM // 8)[None, :]
        tl.store(p_entry[:, None] + HALF + o_eight[None, :], b_fifth, mask=m_eight)
    p_scales = (p_entry + NUMBERS).to(tl.pointer_type(tl.float16))
    tl.store(p_scales, b_step, mask=m_entry)
    tl.store(p_scales + 1, b_least, mask=m_entry)


@triton.jit(do_not_specialize=["n_tokens"])
def append_rows(
    p_new_keys: tl.tensor,
    p_new_values: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_offsets: tl.tensor,
    p_lengths: tl.tensor,
    p_counts: tl.tensor | None,
    p_ring_first: tl.tensor | None,
    p_ring_size: tl.tensor | None,
    stride_key_row: tl.tensor,
    stride_key_token: tl.tensor,
    stride_value_row: tl.tensor,
    stride_value_token: tl.tensor,
    n_tokens: tl.tensor,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    QUANTIZED: tl.constexpr,
    VALUE_BITS: tl.constexpr,
) -> None:
    i_row = tl.program_id(0).to(tl.int64)
    entry = tl.load(p_offsets + i_row)
    length = tl.load(p_lengths + i_row)
    count = n_tokens
    if p_counts is not None:
        count = tl.load(p_counts + i_row)
    # All warps have read the length before one of them raises it.
    tl.debug_barrier()

    o_d = tl.arange(0, PADDED_DIM)
    m_d = o_d < DIM
    for begin in range(n_tokens - count, n_tokens, BLOCK_T):
        o_token = begin + tl.arange(0, BLOCK_T)
        m_token = o_token < n_tokens
        o_slot = length + o_token - (n_tokens - count)
        if p_ring_size is not None:
            first, size = tl.load(p_ring_first + i_row), tl.load(p_ring_size + i_row)
            m_ring = (size > 0) & (o_slot >= first)
            # Of the tokens that share a slot only the newest is written: stores of one launch have no order.
            m_token = m_token & ~(m_ring & (o_slot + size < length + count))
            o_slot = tl.where(m_ring, first + (o_slot - first) % tl.maximum(size, 1), o_slot)
        m_tile = m_token[:, None] & m_d[None, :]
        o_token = o_token.to(tl.int64)
        # [BLOCK_T, PADDED_DIM]
        o_keys = i_row * stride_key_row + o_token * stride_key_token
        b_keys = tl.load(p_new_keys + o_keys[:, None] + o_d[None, :], mask=m_tile, other=0.0)
        store_entries(p_keys, entry + o_slot, o_d, b_keys, m_tile, m_token, DIM, QUANTIZED)
        o_values = i_row * stride_value_row + o_token * stride_value_token
        b_values = tl.load(p_new_values + o_values[:, None] + o_d[None, :], mask=m_tile, other=0.0)
        if VALUE_BITS < 8:
            store_turned_entries(
                p_values, entry + o_slot, b_values, m_tile, m_token, DIM, PADDED_DIM, BLOCK_T, VALUE_BITS
            )
        else:
            store_entries(p_values, entry + o_slot, o_d, b_values, m_tile, m_token, DIM, QUANTIZED)
    tl.store(p_lengths + i_row, length + count)


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
        arena_keys, arena_values: [S, D] contiguous, a layer's storage, written; or small entries, of their dtypes.
        offsets: [R] int64, a row's first arena entry.
        lengths: [R] int32, tokens ever written to a row, raised; with a ring this may pass the row's entries.
        counts: [R] int32, how many of the Q tokens are real, the last ones (left padding); None: all.
        ring_first, ring_size: [R] int32, entries; size 0: the row has no ring. None: no row has.
    """
    rows, new, dim = new_keys.shape
    if new_keys.numel() == 0:
        return
    if new_keys.stride(-1) != 1 or new_values.stride(-1) != 1:
        new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
    block = 1 if new == 1 else BLOCK_TOKENS
    append_rows[(rows,)](
        new_keys,
        new_values,
        arena_keys,
        arena_values,
        offsets,
        lengths,
        counts,
        ring_first,
        ring_size,
        *new_keys.stride()[:2],
        *new_values.stride()[:2],
        new,
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        BLOCK_T=block,
        QUANTIZED=arena_keys.dtype == torch.int8,
        VALUE_BITS=BITS.get(arena_values.dtype, 8),
        num_warps=warps(block, is_turned(arena_values.dtype)),
        num_stages=1,
    )


def warps(block: int, turning: bool) -> int:
    """One warp moves one token, four move a block, eight turn it as well."""
    return 1 if block == 1 else 8 if turning else 4


def variants() -> list[Variant]:
    """One token and a chunk; plain rows, left-padded rows with rings, and small entries."""
    return [
        append_variant(dtype, dim, block, ring=ring, values=values)
        for dtype, dim in (("fp16", 64), ("fp16", 80), ("bf16", 128), ("fp32", 128), ("fp16", 256))
        for block in (1, BLOCK_TOKENS)
        for ring, values in ((False, dtype), (True, dtype), *((False, form) for form in SMALL_FORMS))
    ]


def append_variant(dtype: str, dim: int, block: int, *, ring: bool, values: str) -> Variant:
    """One form of ``append_rows``; ``ring``: with rings and counts of real tokens; ``values``: how they are stored."""
    keys, stored = dtype if values == dtype else "i8", STORED.get(values, torch.float32)
    shape = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK_T": block}
    shape |= {"QUANTIZED": keys == "i8", "VALUE_BITS": BITS.get(stored, 8)}
    optional = ("p_counts", "p_ring_first", "p_ring_size")
    absent = {} if ring else dict.fromkeys(optional)
    pointers = dict.fromkeys(("p_new_keys", "p_new_values"), f"*{dtype}")
    pointers |= {"p_keys": f"*{keys}", "p_values": f"*{values}"}
    pointers |= {"p_offsets": "*i64", "p_lengths": "*i32"} | dict.fromkeys(optional, "*i32")
    strides = dict.fromkeys(("stride_key_row", "stride_key_token", "stride_value_row", "stride_value_token"), "i32")
    constexprs = absent | shape
    return Variant(
        operation="append",
        name=f"append {dtype} D{dim} T{block}{' ring' * ring}{SMALL_FORMS.get(values, '')}",
        kernel=append_rows,
        signature=pointers | strides | {"n_tokens": "i32"} | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=frozenset(pointers | strides) - absent.keys(),
        num_warps=warps(block, is_turned(stored)),
        num_stages=1,
        streams=False,
    )
