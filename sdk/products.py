"""Products of float32 matrices that are copies of bfloat16.

Attention that is noted cannot be left to a fused kernel: it works on float32 copies of queries, keys and values. Where
these were bfloat16, a processor that multiplies bfloat16 and adds in float32 (AMX, AVX-512 BF16) finds the same logits
in half the time; weights are rounded to bfloat16, as fused kernels round them. oneDNN does so when it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Round the factors of float32 products on a CPU to bfloat16 meanwhile, where states are of this dtype anyway.

    It is a setting of the process, as torch has it. Nothing changes for other dtypes, on processors without such
    products, and before torch 2.9, which has no such setting.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
