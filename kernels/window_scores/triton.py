"""Column means of the observation window's attention (Task-KV eq. 12-13), in Triton: two passes over K.

Pass 1 leaves log2 of the sum of exponentials of every query row per tile of keys, a small kernel merges the tiles,
pass 2 computes the logits again and writes the means: [heads, L, N] is never in memory. Logits are held as
[keys, queries], so that the long side is the M dimension of ``tl.dot`` whatever L is. Shapes and bytes: README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from thinkkv.kernels.variant import Variant

LOG2_E = 1.4426950408889634
"""exp(x) = exp2(x * LOG2_E); the hardware has exp2 only."""

QUERIES_AT_ONCE = 32
"""Most query rows in one ``tl.dot``; more would spill registers."""

MERGED_TILES = 16
"""Tiles that the merging program reads at once."""

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels are interpreted: the interpreter's ``tl.dot`` is wrong for bfloat16, so it gets float32 there."""


@triton.jit
def _load_keys(
    p_keys, i_row, o_key, stride_head, stride_key, tokens,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_D] keys of one KV head; zeros past N and past D."""
    o_dim = tl.arange(0, BLOCK_D)
    m_keys = (o_key < tokens)[:, None] & (o_dim < DIM)[None, :]
    o_keys = i_row.to(tl.int64) * stride_head + o_key.to(tl.int64)[:, None] * stride_key + o_dim[None, :]
    # [BLOCK_N, BLOCK_D] of [n, N, D]
    b_keys = tl.load(p_keys + o_keys, mask=m_keys, other=0.0)
    return b_keys.to(tl.float32) if WIDEN else b_keys


@triton.jit
def _logits(
    b_keys, p_queries, i_head, o_query, o_key, stride_head, stride_query, tokens, window, scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_L] float32 logits of one query head in units of log2; -inf where causality hides the key."""
    o_dim = tl.arange(0, BLOCK_D)
    m_queries = (o_query < window)[:, None] & (o_dim < DIM)[None, :]
    o_queries = i_head * stride_head + o_query.to(tl.int64)[:, None] * stride_query + o_dim[None, :]
    # [BLOCK_L, BLOCK_D] of [Hq, L, D]; what the zeros past L give is dropped by the caller
    b_queries = tl.load(p_queries + o_queries, mask=m_queries, other=0.0)
    if WIDEN:
        b_queries = b_queries.to(tl.float32)
    b_logits = tl.dot(b_keys, tl.trans(b_queries), input_precision="ieee") * scale
    # Query l is the prompt's token N - L + l.
    m_seen = o_key[:, None] <= (tokens - window + o_query)[None, :]
    return tl.where(m_seen, b_logits, float("-inf"))


@triton.jit
def partial_sums(
    p_queries, p_keys, p_partials,
    stride_query_head, stride_query, stride_key_head, stride_key,
    group, tokens, window, tiles, scale,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Pass 1: log2 of the sum of exponentials over a tile of keys, for every query row of one KV head."""
    i_tile = tl.program_id(0)
    i_row = tl.program_id(1)
    o_key = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_keys = _load_keys(p_keys, i_row, o_key, stride_key_head, stride_key, tokens, DIM, BLOCK_D, WIDEN)
    for i_step in range(group * CHUNKS):
        i_head = (i_row * group + i_step // CHUNKS).to(tl.int64)
        o_query = (i_step % CHUNKS) * BLOCK_L + tl.arange(0, BLOCK_L)
        b_logits = _logits(
            b_keys, p_queries, i_head, o_query, o_key, stride_query_head, stride_query, tokens, window, scale,
            DIM, BLOCK_D, WIDEN,
        )  # fmt: skip
        b_highest = tl.max(b_logits, axis=0)
        # A query that sees nothing of this tile leaves -inf: no exp2(-inf + inf), and the maximum's own term is 1.
        b_shift = tl.where(b_highest == float("-inf"), 0.0, b_highest)
        b_partial = b_highest + tl.log2(tl.maximum(tl.sum(tl.exp2(b_logits - b_shift[None, :]), axis=0), 1.0))
        # [BLOCK_L] of [Hq, T, L]
        tl.store(p_partials + (i_head * tiles + i_tile) * window + o_query, b_partial, mask=o_query < window)


@triton.jit
def merge_sums(p_partials, p_sums, window, tiles, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, CHUNKS: tl.constexpr):
    """Between the passes: log2 of L times the sum of exponentials over all keys, for a chunk of one head's queries."""
    i_head = tl.program_id(0).to(tl.int64)
    o_query = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    b_highest = tl.full([BLOCK_L], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_L], tl.float32)
    for i_first in range(0, tiles, BLOCK_T):
        o_tile = i_first + tl.arange(0, BLOCK_T)
        m_tile = (o_tile < tiles)[:, None]
        o_partials = (i_head * tiles + o_tile)[:, None] * window + o_query[None, :]
        # [BLOCK_T, BLOCK_L] of [Hq, T, L]; every query sees the first tile, so the maximum is finite from there on
        b_partials = tl.load(p_partials + o_partials, mask=m_tile & (o_query < window)[None, :], other=0.0)
        b_partials = tl.where(m_tile, b_partials, float("-inf"))
        b_new = tl.maximum(b_highest, tl.max(b_partials, axis=0))
        b_sum = b_sum * tl.exp2(b_highest - b_new) + tl.sum(tl.exp2(b_partials - b_new[None, :]), axis=0)
        b_highest = b_new
    # [BLOCK_L] of [Hq, CHUNKS * BLOCK_L]; an infinite sum: queries past L weigh nothing
    b_out = tl.where(o_query < window, b_highest + tl.log2(b_sum * window), float("inf"))
    tl.store(p_sums + i_head * CHUNKS * BLOCK_L + o_query, b_out)


@triton.jit
def column_means(
    p_queries, p_keys, p_sums, p_scores,
    stride_query_head, stride_query, stride_key_head, stride_key,
    group, tokens, window, scale,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Pass 2: means over L of a tile's attention, for every query head of one KV head."""
    i_tile = tl.program_id(0)
    i_row = tl.program_id(1)
    o_key = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_keys = _load_keys(p_keys, i_row, o_key, stride_key_head, stride_key, tokens, DIM, BLOCK_D, WIDEN)
    b_scores = tl.zeros([BLOCK_N], tl.float32)
    for i_step in range(group * CHUNKS):
        i_head = (i_row * group + i_step // CHUNKS).to(tl.int64)
        i_chunk = i_step % CHUNKS
        o_query = i_chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        b_logits = _logits(
            b_keys, p_queries, i_head, o_query, o_key, stride_query_head, stride_query, tokens, window, scale,
            DIM, BLOCK_D, WIDEN,
        )  # fmt: skip
        # [BLOCK_L] of [Hq, CHUNKS * BLOCK_L]; padded, so that it is loaded without a mask
        b_sums = tl.load(p_sums + i_head * CHUNKS * BLOCK_L + o_query)
        b_scores = tl.where(i_chunk == 0, 0.0, b_scores) + tl.sum(tl.exp2(b_logits - b_sums[None, :]), axis=1)
        # [BLOCK_N] of [Hq, N]
        m_scores = (o_key < tokens) & (i_chunk == CHUNKS - 1)
        tl.store(p_scores + i_head * tokens + o_key, b_scores, mask=m_scores)


@dataclass(frozen=True)
class Tiling:
    """Launch configuration of the two passes.

    Args:
        keys: keys of a program.
        num_warps: warps of a program.
    """

    keys: int
    num_warps: int

    @classmethod
    def of(cls, dim: int, itemsize: int) -> Tiling:
        """Tiles of at most 32 KiB; float32 has no matrix instructions on NVIDIA and spreads over more warps."""
        if itemsize == 4:
            return cls(keys=64 if dim <= 128 else 32, num_warps=8)
        return cls(keys=128 if dim <= 128 else 64, num_warps=4)


NUM_STAGES = 2


def window_scores(queries: torch.Tensor, keys: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Mean attention that the last queries of a prompt give to each of its tokens.

    Args:
        queries: [Hq, L, D], the last L queries of the prompt, rotated like the keys and of their dtype.
        keys: [n, N, D] with N >= L; query head h reads KV head ``h // (Hq / n)``. Any strides.
        scale: softmax scale, usually ``D ** -0.5``.

    Returns:
        [Hq, N] float32; every row sums to 1. ``A' = softmax(Q[-L:] K^T * scale + causal mask)``, mean over L.
    """
    (query_heads, window, dim), (kv_heads, tokens, _) = queries.shape, keys.shape
    queries, keys = _unit_last(queries), _unit_last(keys)
    tiling = Tiling.of(dim, keys.itemsize)
    tiles = triton.cdiv(tokens, tiling.keys)
    partials = torch.empty(query_heads, tiles, window, dtype=torch.float32, device=keys.device)
    rows = _rows(window)
    sums = torch.empty(query_heads, rows["CHUNKS"] * rows["BLOCK_L"], dtype=torch.float32, device=keys.device)
    scores = torch.empty(query_heads, tokens, dtype=torch.float32, device=keys.device)
    blocks = _blocks(dim, window, tiling, widen=INTERPRETED and keys.dtype == torch.bfloat16)
    launch = {"num_warps": tiling.num_warps, "num_stages": NUM_STAGES}
    strides = (*queries.stride()[:2], *keys.stride()[:2])
    shape = (query_heads // kv_heads, tokens, window)
    log2_scale = scale * LOG2_E
    with torch.cuda.device_of(keys):
        grid = (tiles, kv_heads)
        partial_sums[grid](queries, keys, partials, *strides, *shape, tiles, log2_scale, **blocks, **launch)
        merge_sums[(query_heads, rows["CHUNKS"])](partials, sums, window, tiles, BLOCK_T=MERGED_TILES, **rows)
        column_means[grid](queries, keys, sums, scores, *strides, *shape, log2_scale, **blocks, **launch)
    return scores


def _unit_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy: 16-byte loads need it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(window: int) -> dict[str, int]:
    """How the window is cut; ``tl.dot`` wants powers of two from 16 on."""
    block = min(QUERIES_AT_ONCE, max(16, triton.next_power_of_2(window)))
    return {"BLOCK_L": block, "CHUNKS": triton.cdiv(window, block)}


def _blocks(dim: int, window: int, tiling: Tiling, *, widen: bool) -> dict[str, int | bool]:
    """Constexpr arguments of both passes."""
    block_d = max(16, triton.next_power_of_2(dim))
    return {"DIM": dim, "BLOCK_N": tiling.keys, "BLOCK_D": block_d, "WIDEN": widen, **_rows(window)}


def variants() -> list[Variant]:
    """Both passes for every head dim and dtype at the default window, for other windows at D 128, and the merge."""
    itemsizes = {"fp16": 2, "bf16": 2, "fp32": 4}
    shapes = [(dtype, dim, 32) for dtype in itemsizes for dim in (64, 80, 96, 128, 256)]
    shapes += [(dtype, 128, window) for dtype in ("fp16", "fp32") for window in (1, 64)]
    passes = [
        _pass_variant(label, kernel, dtype, itemsizes[dtype], dim, window)
        for label, kernel in (("sums", partial_sums), ("means", column_means))
        for dtype, dim, window in shapes
    ]
    return passes + [_merge_variant(window) for window in (1, 32, 64)]


def _pass_variant(label: str, kernel: Any, dtype: str, itemsize: int, dim: int, window: int) -> Variant:
    tiling = Tiling.of(dim, itemsize)
    constexprs = _blocks(dim, window, tiling, widen=False)
    kinds = {"p_queries": f"*{dtype}", "p_keys": f"*{dtype}", "scale": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    return Variant(
        operation="window_scores",
        name=f"{label} {dtype} D{dim} L{window}",
        kernel=kernel,
        signature={name: kinds.get(name, "*fp32" if name.startswith("p_") else "i32") for name in kernel.arg_names},
        constexprs=constexprs,
        divisible=frozenset(name for name in kernel.arg_names if name.startswith(("p_", "stride_"))),
        num_warps=tiling.num_warps,
        num_stages=NUM_STAGES,
        streams=True,
    )


def _merge_variant(window: int) -> Variant:
    return Variant(
        operation="window_scores",
        name=f"merge L{window}",
        kernel=merge_sums,
        signature={
            "p_partials": "*fp32",
            "p_sums": "*fp32",
            "window": "i32",
            "tiles": "i32",
            "BLOCK_T": "constexpr",
            "BLOCK_L": "constexpr",
            "CHUNKS": "constexpr",
        },
        constexprs={"BLOCK_T": MERGED_TILES, **_rows(window)},
        divisible=frozenset({"p_partials", "p_sums"}),
        num_warps=4,
        num_stages=NUM_STAGES,
        streams=False,
    )
