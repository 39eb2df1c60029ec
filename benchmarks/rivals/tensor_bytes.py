"""Bytes of tensors: quantized ones are tensors that hold others, with their scales."""

from __future__ import annotations

from typing import Any

import torch


def tensor_bytes(found: Any) -> int:
    """Of all tensors in whatever holds them; anything else has none."""
    if isinstance(found, torch.Tensor):
        parts = found.__tensor_flatten__()[0] if hasattr(found, "__tensor_flatten__") else []
        return sum(tensor_bytes(getattr(found, name)) for name in parts) if parts else found.nbytes
    if isinstance(found, dict):
        return sum(map(tensor_bytes, found.values()))
    return sum(map(tensor_bytes, found)) if isinstance(found, list | tuple) else 0
