"""The kernel in C for CPUs (``native.c``): attention of one new token over rows of different length.

It reads every key and value once for its whole query group, where torch's attention reads them again and again from the
processor's caches; so it runs at about the speed of memory.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from thinkkv.kernels.c_library import load
from thinkkv.kernels.c_types import STORED_TYPES, TYPES
from thinkkv.kernels.decode_sizes import serves

_kernel = load(Path(__file__).with_suffix(".c")).ragged_decode
_kernel.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 3 + [ctypes.c_float] + [ctypes.c_int] * 3
_kernel.restype = ctypes.c_int


def takes(query: torch.Tensor) -> bool:
    """Whether the kernel is made for such a query, [R, G, Q, D]: one token, and the dtypes and sizes that it knows."""
    _, group, new, dim = query.shape
    return new == 1 and serves(group, dim) and query.dtype in TYPES


def ragged_decode(
    query: torch.Tensor,
    arena_keys: torch.Tensor,
    arena_values: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """As the reference beside it, for a query that the kernel ``takes``: [R, G, 1, D].

    Raises:
        MemoryError: no room for the sums of the rows' parts.
    """
    rows, group, _, dim = query.shape
    query = query.contiguous()
    starts = None if starts is None else starts.contiguous()
    out = torch.empty_like(query)
    tensors = (out, query, arena_keys, arena_values, offsets, lengths)
    pointers = (*(tensor.data_ptr() for tensor in tensors), None if starts is None else starts.data_ptr())
    threads = torch.get_num_threads()
    types = TYPES[query.dtype], STORED_TYPES[arena_values.dtype]
    if not _kernel(*pointers, rows, group, dim, scale, *types, threads):
        raise MemoryError("no memory left to attend to the cache")
    return out


# Defined by hand, as torch.library.custom_op doubles the time of a call.
NAME = "thinkkv::ragged_decode"
SCHEMA = "(Tensor q, Tensor keys, Tensor values, Tensor offsets, Tensor lengths, Tensor? starts, float scale) -> Tensor"
torch.library.define(NAME, SCHEMA)
torch.library.impl(NAME, "cpu", ragged_decode)


@torch.library.register_fake(NAME)
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


operator = torch.ops.thinkkv.ragged_decode.default
"""The same as an operator that a compiler leaves as it is."""
