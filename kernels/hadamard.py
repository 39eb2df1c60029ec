"""States turned by a Hadamard matrix, so that no dimension is much larger than the others.

A step for all dimensions of a value is as coarse as the largest of them demands. Turned, every dimension is a sum of
all with signs, so they are about alike and the step is finer (QuaRot, arXiv:2404.00456). Attention is a weighted sum of
values, so its output is turned as they are, and turned back once for all tokens that it sums. The matrix is its own
inverse.
"""

from __future__ import annotations

import torch


def turned(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[..., D] states in their dtype, turned; turned again they are what they were, up to rounding.

    Args:
        states: any dtype; multiplied in float32, since processors without bfloat16 multiply it many times slower.
        matrix: [D, D], from ``hadamard``.
    """
    return (states.float() @ matrix).to(states.dtype)


def hadamard(dim: int, device: torch.device) -> torch.Tensor:
    """[D, D] float32, symmetric and orthogonal: Sylvester's, of the largest power of two in D, along the diagonal."""
    block = torch.ones(1, 1)
    while dim % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    return torch.block_diag(*[block / len(block) ** 0.5] * (dim // len(block))).to(device)
