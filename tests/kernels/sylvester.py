"""Sylvester's matrix as its definition says, to compare with."""

from __future__ import annotations

import numpy as np
import torch


def sylvester(dim: int) -> torch.Tensor:
    """[D, D] float64: of the largest power of two in D, along the diagonal."""
    power = next(power for power in (2**bits for bits in range(20, -1, -1)) if dim % power == 0)
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(power)] for i in range(power)])
    return torch.from_numpy(np.kron(np.eye(dim // power), signs) / np.sqrt(power))
