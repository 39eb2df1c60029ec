"""What an entry of an arena is: D numbers of the model's dtype, or D small integers and what they are multiples of.

A small entry is its numbers as int8, then its scale as the four bytes of a float32. So an entry is one piece of memory
whatever it holds: what moves entries need not know, only what writes and reads them. Keys are stored after rotation,
each token of each head by itself, so nothing that is stored is ever touched again (a choice of ours; KIVI, which goes
down to two bits, needs groups of tokens for its keys: arXiv:2402.02750).
"""

from __future__ import annotations

import torch

SCALE_BYTES = 4
LARGEST = 127
"""Integers go from -LARGEST to LARGEST."""


def entry_bytes(dim: int, dtype: torch.dtype, *, quantized: bool) -> int:
    """Bytes of one token's key, or value, in one KV head."""
    return dim + SCALE_BYTES if quantized else dim * dtype.itemsize


def quantize(states: torch.Tensor) -> torch.Tensor:
    """Small entries of [..., D] states, D a multiple of four: [..., D + SCALE_BYTES] int8."""
    wide = states.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([(wide / scale).round_().to(torch.int8), scale.view(torch.int8)], dim=-1)


def entries_of(states: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What an arena of dtype ``stored`` holds of [..., D] states: themselves, or small entries."""
    return quantize(states) if stored == torch.int8 else states


def states_of(entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The states in [..., D] or [..., D + SCALE_BYTES] entries: [..., D], the entries themselves where they are that.

    Args:
        entries: as they are stored.
        dtype: of the model.
    """
    if entries.dtype != torch.int8:
        return entries
    dim = entries.shape[-1] - SCALE_BYTES
    scale = entries[..., dim:].view(torch.float32)
    return (entries[..., :dim] * scale).to(dtype)
