"""The kernel in C for CPUs (``native.c``): a linear layer of few rows at the speed of memory.

torch's CPU libraries multiply a single row and a matrix on one thread, or far below the speed of memory on several.
More rows are torch's, or ``widened`` where torch takes them slowly.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from thinkkv.kernels.c_library import load
from thinkkv.kernels.c_types import TYPES
from thinkkv.kernels.linear import reference, widened

MAX_ROWS = 8
"""With more, torch's matrix products are as fast."""

_kernel = load(Path(__file__).with_suffix(".c")).linear
_kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
_kernel.restype = ctypes.c_int


def takes(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernel is made for such arguments: few rows, and what ``is_plain``."""
    return 0 < _rows(inputs, weight) <= MAX_ROWS and is_plain(inputs, weight, bias)


def is_plain(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether these are plain tensors of one dtype in memory, without gradient and autocast."""
    return (
        inputs.dtype == weight.dtype
        and inputs.dtype in TYPES
        and inputs.device.type == weight.device.type == "cpu"
        and type(inputs) is torch.Tensor  # a subclass may have no memory of its own, or in another form
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == inputs.dtype and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


def _rows(inputs: torch.Tensor, weight: torch.Tensor) -> int:
    return inputs.numel() // max(1, weight.shape[1])


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As the reference beside it, for what the kernel ``takes``; sums are float32.

    Raises:
        MemoryError: no room for the rows in float32.
    """
    outs, size = weight.shape
    inputs = inputs.contiguous()
    out = inputs.new_empty((*inputs.shape[:-1], outs))
    pointers = (out.data_ptr(), inputs.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr())
    rows, threads = inputs.numel() // size, torch.get_num_threads()
    if not _kernel(*pointers, rows, size, outs, TYPES[inputs.dtype], threads):
        raise MemoryError("no memory left for a linear layer")
    return out


# Defined by hand, as torch.library.custom_op doubles the time of a call.
NAME = "thinkkv::linear"
torch.library.define(NAME, "(Tensor inputs, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(NAME, "cpu", product)


@torch.library.register_fake(NAME)
def _(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], weight.shape[0]))


operator = torch.ops.thinkkv.linear.default
"""``product`` as an operator that a compiler leaves as it is."""


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As the reference, by the kernel where it ``takes`` the arguments; more rows in float32 where that pays."""
    if not takes(inputs, weight, bias):
        many = _rows(inputs, weight) > MAX_ROWS and not torch.compiler.is_compiling()
        widen = many and widened.pays_for(weight.dtype) and is_plain(inputs, weight, bias)
        return (widened.product if widen else reference.linear)(inputs, weight, bias)
    if not torch.compiler.is_compiling():
        return product(inputs, weight, bias)
    if inputs.numel() == weight.shape[1]:  # a single row becomes a loop, fused with its neighbours: sdk/compiled.py
        return reference.linear(inputs, weight, bias)
    return operator(inputs, weight, bias)


def forward(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer."""
    return linear(inputs, layer.weight, layer.bias)
