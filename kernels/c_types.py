"""Dtypes as the kernels in C count them."""

from __future__ import annotations

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""``enum type`` of ``vectors.h``, but for small entries."""

STORED_TYPES = TYPES | {torch.int8: 3, torch.uint8: 4, torch.int16: 5}
"""With them. Values say how a layer is stored: keys are as they are, but int8 beside values in int4 and int5."""
