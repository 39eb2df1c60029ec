"""The kernel in C for CPUs (``native.c``): one new token behind every row, rounded to a small entry on its way.

In torch the rounding is some ten operations for keys and ten for values, in every layer.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from thinkkv.kernels.c_library import load
from thinkkv.kernels.c_types import STORED_TYPES, TYPES

LANES, MAX_DIM = 8, 256

_kernel = load(Path(__file__).with_suffix(".c")).append
_kernel.argtypes = (
    [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int] * 2
)
_kernel.restype = None


def takes(states: torch.Tensor) -> bool:
    """Whether the kernel is made for such keys or values, [..., D]."""
    dim = states.shape[-1]
    return dim <= MAX_DIM and dim % LANES == 0 and states.dtype in TYPES


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    """Write one token behind every row, in place; its length is the caller's to change.

    Args:
        new_keys, new_values: [R, D], any strides between rows; what the kernel ``takes``.
        arena_keys, arena_values: small entries (``thinkkv.kernels.entries``), written.
        offsets: [R] int64, a row's first arena entry.
        lengths: [R] int32, entries in use.
    """
    for stored, states in ((arena_keys, new_keys), (arena_values, new_values)):
        states = states if states.stride(-1) == 1 else states.contiguous()
        rows, dim = states.shape
        places = offsets.data_ptr(), lengths.data_ptr()
        types = TYPES[states.dtype], STORED_TYPES[stored.dtype]
        _kernel(stored.data_ptr(), states.data_ptr(), states.stride(0), *places, rows, dim, *types)
