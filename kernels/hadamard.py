"""States turned by a Hadamard matrix, so that no dimension is much larger than the others.

A step for all dimensions of a value is as coarse as the largest of them demands. Turned, every dimension is a sum of
all with signs, so they are about alike and the step is finer (QuaRot, arXiv:2404.00456). Attention is a weighted sum of
values, so it may be summed of turned ones and turned back once.

The matrix is Sylvester's, of the largest power of two in D, along the diagonal: symmetric, and its own inverse. Its
product is sums and differences of pairs of dimensions, stage after stage; in float32 that has one result to the bit,
which the kernels in C (``vectors.h``) and in Triton (``hadamard_triton.py``) have, too.
"""

from __future__ import annotations

import torch


def turned(states: torch.Tensor) -> torch.Tensor:
    """[..., D] float32 states, turned; turned again they are what they were, up to rounding."""
    dim = states.shape[-1]
    block = block_of(dim)
    blocks = states.unflatten(-1, (dim // block, block))
    for _ in range(block.bit_length() - 1):
        # Dimensions that differ in the lowest bit meet, and the results' bit becomes the highest: the lowest again
        # when all others have been.
        first, second = blocks[..., 0::2], blocks[..., 1::2]
        blocks = torch.cat([first + second, first - second], dim=-1)
    return (blocks * block**-0.5).flatten(-2)


def block_of(dim: int) -> int:
    """The largest power of two in D."""
    return dim & -dim
