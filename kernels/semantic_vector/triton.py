"""Semantic vectors of attention heads (Task-KV eq. 14-15), in Triton: torch chooses, one kernel gathers and sums.

The chosen tokens of a head are split over programs. Each leaves one float32 partial sum and torch adds those up, so the
order of additions is fixed: no atomics, the same bits every time. Shapes and bytes: README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from thinkkv.kernels.variant import Variant

TILE_BYTES = 16384
"""Bytes of values that a program gathers: eight 16-byte loads in flight per thread."""

NUM_WARPS = 4
NUM_STAGES = 1


@triton.jit
def gather_sum(
    p_weights, p_index, p_values, p_partials,
    stride_head, stride_value, group, top, splits,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted sum of up to BLOCK_T chosen values of one head."""
    i_split = tl.program_id(0)
    i_head = tl.program_id(1).to(tl.int64)
    o_top = i_split * BLOCK_T + tl.arange(0, BLOCK_T)
    o_dim = tl.arange(0, BLOCK_D)
    m_top = o_top < top
    # [BLOCK_T] of [H, t]
    b_weights = tl.load(p_weights + i_head * top + o_top, mask=m_top, other=0.0)
    b_index = tl.load(p_index + i_head * top + o_top, mask=m_top, other=0)
    o_values = (i_head // group) * stride_head + b_index.to(tl.int64)[:, None] * stride_value + o_dim[None, :]
    # [BLOCK_T, BLOCK_D] rows of [n, N, D]
    b_values = tl.load(p_values + o_values, mask=m_top[:, None] & (o_dim < DIM)[None, :], other=0.0)
    b_sum = tl.sum(b_weights[:, None] * b_values.to(tl.float32), axis=0)
    # [BLOCK_D] of [H, S, D]
    tl.store(p_partials + (i_head * splits + i_split) * DIM + o_dim, b_sum, mask=o_dim < DIM)


def semantic_vector(weights: torch.Tensor, values: torch.Tensor, *, top: int) -> torch.Tensor:
    """Weighted sum of the values of each head's most attended tokens, not renormalised.

    Args:
        weights: [H, N] float32 attention weights; H is a multiple of n, row h reads KV head ``h // (H / n)``.
        values: [n, N, D]. Any strides.
        top: t, how many tokens count; all of them where N is smaller.

    Returns:
        [H, D] float32: ``v' = C[I] @ V[I]`` with ``I = topk(C, t)``.
    """
    (heads, tokens), (kv_heads, _, dim) = weights.shape, values.shape
    if values.stride(-1) != 1:
        values = values.contiguous()  # 16-byte loads need it
    chosen, index = weights.topk(min(top, tokens), dim=-1)
    tokens_per_program = _tokens_per_program(dim, values.itemsize)
    splits = triton.cdiv(chosen.shape[1], tokens_per_program)
    partials = torch.empty(heads, splits, dim, dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        gather_sum[(splits, heads)](
            chosen, index, values, partials,
            *values.stride()[:2], heads // kv_heads, chosen.shape[1], splits,
            DIM=dim, BLOCK_T=tokens_per_program, BLOCK_D=triton.next_power_of_2(dim),
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return partials.sum(dim=1)


def _tokens_per_program(dim: int, itemsize: int) -> int:
    return max(16, TILE_BYTES // (triton.next_power_of_2(dim) * itemsize))


def variants() -> list[Variant]:
    """Every head dim and dtype."""
    itemsizes = {"fp16": 2, "bf16": 2, "fp32": 4}
    return [_variant(dtype, itemsizes[dtype], dim) for dtype in itemsizes for dim in (64, 80, 96, 128, 256)]


def _variant(dtype: str, itemsize: int, dim: int) -> Variant:
    constexprs = {
        "DIM": dim,
        "BLOCK_T": _tokens_per_program(dim, itemsize),
        "BLOCK_D": triton.next_power_of_2(dim),
    }
    kinds = {"p_weights": "*fp32", "p_index": "*i64", "p_values": f"*{dtype}", "p_partials": "*fp32"}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    return Variant(
        operation="semantic_vector",
        name=f"gather {dtype} D{dim}",
        kernel=gather_sum,
        signature={name: kinds.get(name, "i32") for name in gather_sum.arg_names},
        constexprs=constexprs,
        divisible=frozenset(name for name in gather_sum.arg_names if name.startswith(("p_", "stride_"))),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        streams=True,
    )
