"""Split-K flash decoding over rows of different length (arXiv:2205.14135, and its split form "Flash-Decoding").

A program attends one block of queries to one split of one row. The query group and the new tokens share the M
dimension of ``tl.dot``, so a key is read once for all query heads of its KV head. A second kernel merges a row's
splits by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl

from thinkkv.kernels.entries import BITS
from thinkkv.kernels.hadamard_triton import turned
from thinkkv.kernels.variant import SMALL_FORMS, STORED, Variant

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels below run in Triton's interpreter, whose ``tl.dot`` has no bfloat16: it gets float32 there."""

LOG2_E = 1.4426950408889634
PROGRAMS = 1024
"""Programs that a launch aims at when every row has the longest length: several for each of a GPU's 100 to 150
multiprocessors, and enough left when most rows are shorter."""
SHORTEST_SPLIT, LONGEST_SPLIT = 256, 1024
"""Entries of one split per query block: multiples of every ``block_n`` below, powers of two."""
BLOCK_SPLITS = 16
"""Splits that the merge reads at once."""


@dataclass(frozen=True)
class Tile:
    """How one program walks over its split: entries at a time, warps, stages of the load pipeline."""

    block_n: int
    num_warps: int = 4
    num_stages: int = 2


TILES: Mapping[tuple[int, int], Mapping[int, Tile]] = {
    # (bytes of an element, padded head dimension): {BLOCK_M: tile}. K and V tiles take 16 to 32 KB together, so that
    # several programs fit a multiprocessor; no entry spills on sm_80, sm_90 or gfx942. Float32 multiplies on ordinary
    # cores, where a taller block only costs registers.
    (2, 64): {16: Tile(64), 32: Tile(64), 64: Tile(64, num_warps=8)},
    (2, 128): {16: Tile(64), 32: Tile(32), 64: Tile(32)},
    (2, 256): {16: Tile(32, num_warps=8), 32: Tile(32, num_warps=8), 64: Tile(32, num_warps=8)},
    (4, 64): {16: Tile(32)},
    (4, 128): {16: Tile(16)},
    (4, 256): {16: Tile(16)},
}

# Of small entries, which are widened in registers: one height, and little to pipeline.
QUANTIZED_TILES: Mapping[tuple[int, int], Mapping[int, Tile]] = {
    (2, 64): {16: Tile(64, num_stages=1)},
    (2, 128): {16: Tile(32, num_warps=8, num_stages=1)},
    (2, 256): {16: Tile(16, num_warps=8, num_stages=1)},
    (4, 64): {16: Tile(16, num_warps=8, num_stages=1)},
    (4, 128): {16: Tile(16, num_warps=8)},
    (4, 256): {16: Tile(16, num_warps=8, num_stages=1)},
}
TURNED_TILES: Mapping[tuple[int, int], Mapping[int, Tile]] = {
    **QUANTIZED_TILES,  # but that unpacking takes registers, too
    (2, 64): {16: Tile(32, num_stages=1)},
    (2, 128): {16: Tile(16, num_warps=8, num_stages=1)},
}


@triton.jit
def dot(b_left: tl.tensor, b_right: tl.tensor, FLOAT32_DOT: tl.constexpr) -> tl.tensor:
    if FLOAT32_DOT:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, input_precision="ieee")


@triton.jit
def load_entries(
    p_entries: tl.tensor,
    place: tl.tensor,
    o_entry: tl.tensor,
    o_d: tl.tensor,
    m_d: tl.tensor,
    DIM: tl.constexpr,
    QUANTIZED: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, PADDED_DIM] states, of entries that are these, or int8 entries (``thinkkv.kernels.entries``)."""
    SIZE: tl.constexpr = DIM + 4 * QUANTIZED
    # An entry's place is 64-bit and scalar, offsets inside a tile fit 32 bits.
    base = place * SIZE
    b_numbers = tl.load(p_entries + base + o_entry[:, None] * SIZE + o_d[None, :], mask=m_d[None, :], other=0.0)
    if QUANTIZED:
        p_scales = (p_entries + base + o_entry * SIZE + DIM).to(tl.pointer_type(tl.float32))
        b_numbers = b_numbers.to(tl.float32) * tl.load(p_scales)[:, None]
    return b_numbers


@triton.jit
def load_turned_entries(
    p_entries: tl.tensor,
    place: tl.tensor,
    o_entry: tl.tensor,
    o_d: tl.tensor,
    m_d: tl.tensor,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, PADDED_DIM] turned states of int4 or int5 entries (``thinkkv.kernels.entries``)."""
    HALF: tl.constexpr = DIM // 2
    NUMBERS: tl.constexpr = DIM * BITS // 8  # bytes
    SIZE: tl.constexpr = NUMBERS + 4
    p_tile = p_entries.to(tl.pointer_type(tl.uint8)) + place * SIZE + o_entry * SIZE
    # Each byte is read for its low and for its high half, from the cache the second time.
    o_byte = tl.where(o_d < HALF, o_d, o_d - HALF)
    b_bytes = tl.load(p_tile[:, None] + o_byte[None, :], mask=m_d[None, :], other=0)
    b_numbers = ((b_bytes >> tl.where(o_d < HALF, 0, 4).to(tl.uint8)[None, :]) & 15).to(tl.float32)
    if BITS == 5:
        b_eights = tl.load(p_tile[:, None] + HALF + (o_d // 8)[None, :], mask=m_d[None, :], other=0)
        b_numbers += ((b_eights >> (o_d % 8).to(tl.uint8)[None, :]) & 1).to(tl.float32) * 16.0
    p_scales = (p_tile + NUMBERS).to(tl.pointer_type(tl.float16))
    # [BLOCK_N]
    b_step, b_least = tl.load(p_scales).to(tl.float32), tl.load(p_scales + 1).to(tl.float32)
    return tl.where(m_d[None, :], b_numbers * b_step[:, None] + b_least[:, None], 0.0)


@triton.jit(do_not_specialize=["n_queries", "split"])
def attend_split(
    p_query: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_offsets: tl.tensor,
    p_lengths: tl.tensor,
    p_starts: tl.tensor | None,
    p_partial: tl.tensor,
    p_levels: tl.tensor | None,
    stride_row: tl.tensor,
    stride_head: tl.tensor,
    stride_token: tl.tensor,
    scale: tl.tensor,
    n_queries: tl.tensor,
    split: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUANTIZED: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
) -> None:
    i_split, i_row, i_block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    n_splits = tl.num_programs(0)
    length = tl.load(p_lengths + i_row)

    # A slot of the block is a (query, head): heads fastest, so that a block's queries are few and near each other.
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    i_query, i_head = o_m // GROUP, o_m % GROUP
    m_m = i_query < n_queries
    b_end = length - (n_queries - 1) + i_query
    last_query = tl.minimum((i_block * BLOCK_M + BLOCK_M - 1) // GROUP, n_queries - 1)
    first = i_split * split
    last = tl.minimum(first + split, length - (n_queries - 1) + last_query)
    lowest = first
    if p_starts is not None:
        # [BLOCK_M]
        b_start = tl.load(p_starts + i_row * n_queries + i_query, mask=m_m, other=0)
        b_span = tl.maximum(b_end - b_start, 0).to(tl.uint32)
        lowest = tl.maximum(first, tl.min(tl.where(m_m, b_start, last)))
    # The first split also writes the zeros of rows and queries that see nothing.
    if (i_split > 0) & (lowest >= last):
        return

    o_d = tl.arange(0, PADDED_DIM)
    o_n = tl.arange(0, BLOCK_N)
    m_d = o_d < DIM
    # [BLOCK_M, PADDED_DIM]
    o_query = i_row * stride_row + i_head.to(tl.int64) * stride_head + i_query.to(tl.int64) * stride_token
    b_query = tl.load(p_query + o_query[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)

    entry = tl.load(p_offsets + i_row)
    b_highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for begin in range(first + (lowest - first) // BLOCK_N * BLOCK_N, last, BLOCK_N):
        o_entry = begin + o_n
        # Past the end the last entry is read again: nothing unused is touched and rows need no mask.
        o_tile = tl.minimum(o_n, last - 1 - begin)
        # [BLOCK_N, PADDED_DIM]
        b_keys = load_entries(p_keys, entry + begin, o_tile, o_d, m_d, DIM, QUANTIZED).to(b_query.dtype)
        # [BLOCK_M, BLOCK_N]
        b_scores = dot(b_query, tl.trans(b_keys), FLOAT32_DOT) * scale
        if p_starts is None:
            m_seen = o_entry[None, :] < b_end[:, None]
        else:
            # Both ends in one comparison: entries before the start wrap to huge numbers.
            m_seen = (o_entry[None, :] - b_start[:, None]).to(tl.uint32) < b_span[:, None]
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
        b_higher = tl.maximum(b_highest, tl.max(b_scores, axis=1))
        # A slot that has seen nothing yet stays at -inf; subtracting 0 instead keeps its weights 0, not NaN.
        b_level = tl.where(b_higher == float("-inf"), 0.0, b_higher)
        # Rounded before they are summed, so that rounding does not shift the weighted mean.
        b_weights = tl.exp2(b_scores - b_level[:, None]).to(b_query.dtype)
        b_decay = tl.exp2(b_highest - b_level)
        b_total = b_total * b_decay + tl.sum(b_weights.to(tl.float32), axis=1)
        # [BLOCK_N, PADDED_DIM]
        if VALUE_BITS < 8:
            b_values = load_turned_entries(p_values, entry + begin, o_tile, o_d, m_d, DIM, VALUE_BITS)
        else:
            b_values = load_entries(p_values, entry + begin, o_tile, o_d, m_d, DIM, QUANTIZED)
        b_out = b_out * b_decay[:, None] + dot(b_weights, b_values.to(b_query.dtype), FLOAT32_DOT)
        b_highest = b_higher

    b_divisor = tl.where(b_total == 0.0, 1.0, b_total)
    # [R, n_splits, GROUP, n_queries], then DIM
    o_slot = ((i_row * n_splits + i_split) * GROUP + i_head) * n_queries + i_query
    if p_levels is not None:
        tl.store(p_levels + o_slot, b_highest + tl.log2(b_divisor), mask=m_m)
    b_out = b_out / b_divisor[:, None]
    if VALUE_BITS < 8:
        b_out = turned(b_out, BLOCK_M, DIM, PADDED_DIM)  # every split by itself: the merge is a weighted sum, too
    b_out = b_out.to(p_partial.dtype.element_ty)
    tl.store(p_partial + o_slot[:, None] * DIM + o_d[None, :], b_out, mask=m_m[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["n_queries", "n_splits", "split"])
def merge_splits(
    p_partial: tl.tensor,
    p_levels: tl.tensor,
    p_lengths: tl.tensor,
    p_starts: tl.tensor | None,
    p_out: tl.tensor,
    n_queries: tl.tensor,
    n_splits: tl.tensor,
    split: tl.tensor,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
) -> None:
    i_slot, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_slots = tl.num_programs(0)
    i_query = i_slot % n_queries
    end = tl.load(p_lengths + i_row) - (n_queries - 1) + i_query
    start = 0
    if p_starts is not None:
        start = tl.maximum(tl.load(p_starts + i_row * n_queries + i_query), 0)
    # Exactly the splits in which this query sees something: each was written by its program.
    first, stop = start // split, tl.cdiv(tl.maximum(end, 0), split)
    stop = tl.where(start < end, stop, first)

    o_d = tl.arange(0, PADDED_DIM)
    m_d = o_d < DIM
    highest = float("-inf")
    total = 0.0
    b_out = tl.zeros([PADDED_DIM], tl.float32)
    for i_split in range(first, stop, BLOCK_SPLITS):
        i_splits = i_split + tl.arange(0, BLOCK_SPLITS)
        m_s = i_splits < stop
        o_partial = (i_row * n_splits + i_splits) * n_slots + i_slot
        # [BLOCK_SPLITS]
        b_levels = tl.load(p_levels + o_partial, mask=m_s, other=float("-inf"))
        # [BLOCK_SPLITS, PADDED_DIM]
        o_tile = o_partial[:, None] * DIM + o_d[None, :]
        b_partial = tl.load(p_partial + o_tile, mask=m_s[:, None] & m_d[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(b_levels, axis=0))
        b_weights = tl.exp2(b_levels - higher)
        decay = tl.exp2(highest - higher)
        total = total * decay + tl.sum(b_weights, axis=0)
        b_out = b_out * decay + tl.sum(b_weights[:, None] * b_partial, axis=0)
        highest = higher
    b_out = b_out / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out + (i_row * n_slots + i_slot) * DIM + o_d, b_out.to(p_out.dtype.element_ty), mask=m_d)


def padded_dim(dim: int) -> int:
    """The head dimension that ``tl.dot`` works on: the next power of two, at least 64."""
    if dim > 256:
        raise ValueError(f"head dimension {dim} is above 256, the largest these kernels are laid out for; use torch")
    return max(64, triton.next_power_of_2(dim))


def tiles_of(values: torch.dtype) -> Mapping[tuple[int, int], Mapping[int, Tile]]:
    """The tiles by how values are stored."""
    return {8: QUANTIZED_TILES, 5: TURNED_TILES, 4: TURNED_TILES}.get(BITS.get(values, 0), TILES)


def query_block(slots: int, tiles: Mapping[int, Tile]) -> int:
    """BLOCK_M: the smallest that holds all slots (query heads x new tokens), else the largest."""
    return next((block_m for block_m in tiles if block_m >= slots), max(tiles))


def split_length(longest: int, rows: int, blocks: int) -> int:
    """Entries of one split, a power of two.

    Rows of the longest length alone give about ``PROGRAMS`` programs. The shortest split keeps what one token of
    up to 8 heads writes and the merge reads below a tenth of the split's K and V; the longest spreads one long row
    among short ones. Several query blocks are programs too, so each lets splits be longer, which bounds the scratch.

    Args:
        longest: upper bound of the rows' lengths, entries.
        rows: R.
        blocks: query blocks of a row.
    """
    wanted = triton.next_power_of_2(max(1, triton.cdiv(longest * rows * blocks, PROGRAMS)))
    return min(max(wanted, SHORTEST_SPLIT), LONGEST_SPLIT * triton.next_power_of_2(blocks))


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
        query: [R, G, Q, D] float16, bfloat16 or float32, any strides; G query heads per row.
        arena_keys, arena_values: [S, D] contiguous, in query's dtype: a layer's storage; or small entries
            (``thinkkv.kernels.entries``).
        offsets: [R] int64, a row's first arena entry.
        lengths: [R] int32, entries in use with the Q new tokens, the row's last: query i sees the entries below
            ``length - (Q - 1 - i)``.
        scale: softmax scale, usually ``D ** -0.5``.
        longest: upper bound of ``lengths``, known to the host: plans the splits without waiting for the device.
        starts: [R, Q] int32, the first entry that a query may see (a sliding window); None: all from 0.

    Returns:
        [R, G, Q, D] in query's dtype, contiguous; a query that sees nothing gives zeros.
    """
    rows, group, new, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    query = query if query.stride(-1) == 1 else query.contiguous()
    starts = None if starts is None else starts.contiguous()
    padded = padded_dim(dim)
    tiles = tiles_of(arena_values.dtype)[query.element_size(), padded]
    block_m = query_block(group * new, tiles)
    blocks = triton.cdiv(group * new, block_m)
    split = split_length(longest, rows, blocks)
    splits = max(1, triton.cdiv(longest, split))
    partial, levels = out, None
    if splits > 1:
        partial = torch.empty(rows, splits, group * new, dim, dtype=torch.float32, device=query.device)
        levels = torch.empty(rows, splits, group * new, dtype=torch.float32, device=query.device)
    attend_split[splits, rows, blocks](
        query,
        arena_keys,
        arena_values,
        offsets,
        lengths,
        starts,
        partial,
        levels,
        *query.stride()[:3],
        scale * LOG2_E,
        new,
        split,
        GROUP=group,
        DIM=dim,
        PADDED_DIM=padded,
        BLOCK_M=block_m,
        BLOCK_N=tiles[block_m].block_n,
        QUANTIZED=arena_keys.dtype == torch.int8,
        VALUE_BITS=BITS.get(arena_values.dtype, 8),
        FLOAT32_DOT=INTERPRETED,
        num_warps=tiles[block_m].num_warps,
        num_stages=tiles[block_m].num_stages,
    )
    if levels is not None:
        merge_splits[group * new, rows](
            partial,
            levels,
            lengths,
            starts,
            out,
            new,
            splits,
            split,
            DIM=dim,
            PADDED_DIM=padded,
            BLOCK_SPLITS=BLOCK_SPLITS,
        )
    return out


ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = {16: (1, 7), 32: (8,), 64: (7,)}
"""Query groups compiled ahead of time for each BLOCK_M."""


def variants() -> list[Variant]:
    """Every dtype, head dimension and tile; window, single split and small entries for one group each; the merge."""
    found = []
    for dtype, dim in product(ELEMENT_BYTES, HEAD_DIMS):
        for block_m in TILES[ELEMENT_BYTES[dtype], padded_dim(dim)]:
            found += [split_variant(dtype, dim, group, block_m) for group in GROUPS[block_m]]
        found.append(split_variant(dtype, dim, 7, 16, window=True))
        found.append(split_variant(dtype, dim, 7, 16, single=True))
        if (dtype, dim) != ("fp32", 256):  # works, but spills 16 bytes on sm_90
            found += [split_variant(dtype, dim, 7, 16, values=values) for values in SMALL_FORMS]
        found.append(merge_variant(dtype, dim))
    return found


def split_variant(
    dtype: str,
    dim: int,
    group: int,
    block_m: int,
    *,
    window: bool = False,
    single: bool = False,
    values: str | None = None,
) -> Variant:
    """One form of ``attend_split``; a single split writes the output itself, in its dtype; ``values``: as stored."""
    padded, quantized = padded_dim(dim), values is not None
    stored = STORED.get(values or "", torch.float32)
    tile = tiles_of(stored)[ELEMENT_BYTES[dtype], padded][block_m]
    constexprs = {
        "GROUP": group,
        "DIM": dim,
        "PADDED_DIM": padded,
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "QUANTIZED": quantized,
        "VALUE_BITS": BITS.get(stored, 8),
        "FLOAT32_DOT": False,
    }
    absent = {name: None for name, given in (("p_starts", window), ("p_levels", not single)) if not given}
    pointers = {
        "p_query": f"*{dtype}",
        "p_keys": "*i8" if quantized else f"*{dtype}",
        "p_values": f"*{values or dtype}",
        "p_offsets": "*i64",
        "p_lengths": "*i32",
        "p_starts": "*i32",
        "p_partial": f"*{dtype}" if single else "*fp32",
        "p_levels": "*fp32",
    }
    strides = dict.fromkeys(("stride_row", "stride_head", "stride_token"), "i32")
    plain = {"scale": "fp32", "n_queries": "i32", "split": "i32"}
    form = " window" * window + " single" * single + SMALL_FORMS.get(values or "", "")
    return Variant(
        operation="ragged_decode",
        name=f"split {dtype} D{dim} G{group}->{block_m}{form}",
        kernel=attend_split,
        signature=pointers | strides | plain | dict.fromkeys((*absent, *constexprs), "constexpr"),
        constexprs=constexprs | absent,
        divisible=frozenset(pointers | strides) - absent.keys(),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        streams=not quantized,  # whose entries begin at multiples of four bytes
    )


def merge_variant(dtype: str, dim: int) -> Variant:
    """``merge_splits`` without a window."""
    constexprs = {"p_starts": None, "DIM": dim, "PADDED_DIM": padded_dim(dim), "BLOCK_SPLITS": BLOCK_SPLITS}
    scratch = {"p_partial": "*fp32", "p_levels": "*fp32"}
    pointers = scratch | {"p_lengths": "*i32", "p_starts": "*i32", "p_out": f"*{dtype}"}
    plain = dict.fromkeys(("n_queries", "n_splits", "split"), "i32")
    return Variant(
        operation="ragged_decode",
        name=f"merge {dtype} D{dim}",
        kernel=merge_splits,
        signature=pointers | plain | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        divisible=frozenset(pointers) - constexprs.keys(),
        num_warps=4,
        num_stages=3,
        streams=False,
    )
