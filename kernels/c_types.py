"""Dtypes as the kernels in C count them."""

from __future__ import annotations

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``enum type`` of ``vectors.h``, but for int8 entries."""
