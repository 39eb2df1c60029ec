"""``hadamard.py`` inside a kernel, to the bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turned(b_states: tl.tensor, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr) -> tl.tensor:
    """[ROWS, PADDED_DIM] float32 states, turned; zeros beyond DIM."""
    BLOCK: tl.constexpr = DIM & -DIM
    for stage in tl.static_range(8):
        if 2**stage < BLOCK:
            b_first, b_second = tl.split(tl.reshape(b_states, [ROWS, PADDED_DIM // 2, 2]))
            b_pairs = tl.join(b_first + b_second, b_first - b_second)
            b_states = tl.reshape(tl.permute(b_pairs, [0, 2, 1]), [ROWS, PADDED_DIM])
    if BLOCK < PADDED_DIM:
        # The bits of the blocks' numbers are the lowest now.
        b_blocks = tl.reshape(b_states, [ROWS, BLOCK, PADDED_DIM // BLOCK])
        b_states = tl.reshape(tl.permute(b_blocks, [0, 2, 1]), [ROWS, PADDED_DIM])
    return b_states * BLOCK**-0.5
