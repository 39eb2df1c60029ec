"""What an entry of an arena is: D numbers of the model's dtype, or D small integers and what they are multiples of.

An int8 entry is its numbers, then their scale as the four bytes of a float32. An int4 entry, of dtype uint8, is of
turned states (``hadamard.py``): its numbers two to a byte, the first half of them in the low bits, then their step and
their least number, a float16 each.
So an entry is one piece of memory whatever it holds: what moves entries need not know, only what writes and reads them.
Keys are stored after rotation, each token of each head by itself, so nothing that is stored is ever touched again (a
choice of ours; KIVI, which goes down to two bits, needs groups of tokens for its keys: arXiv:2402.02750). Keys need
more bits than values (arXiv:2502.15075), which are averaged.
"""

from __future__ import annotations

import torch

from thinkkv.kernels.hadamard import turned

SCALE_BYTES = 4
"""Behind the numbers of a small entry."""
LARGEST = 127
"""Integers of int8 go from -LARGEST to LARGEST."""
STEPS = 15
"""Integers of int4 go from 0 to STEPS."""
SMALLEST_STEP = 2.0**-24
"""Of float16, the numbers below normal ones included."""


def entry_bytes(dim: int, stored: torch.dtype) -> int:
    """Bytes of one token's key, or value, in one KV head.

    Args:
        dim: D.
        stored: of the model, int8 for int8 entries, uint8 for int4 entries.
    """
    if stored == torch.int8:
        return dim + SCALE_BYTES
    return dim // 2 + SCALE_BYTES if stored == torch.uint8 else dim * stored.itemsize


def entries_of(states: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What an arena of dtype ``stored`` holds of [..., D] states, D a multiple of 4: themselves, or small entries."""
    if stored == torch.int8:
        return _int8_entries(states.float())
    return _int4_entries(states.float()) if stored == torch.uint8 else states


def states_of(entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The states in entries: [..., D], the entries themselves where they are that.

    Args:
        entries: as they are stored.
        dtype: of the model.
    """
    return turned_back(stored_states(entries, dtype), entries.dtype)


def stored_states(entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As ``states_of``, but for int4 entries, of which it gives the turned states."""
    if entries.dtype not in (torch.int8, torch.uint8):
        return entries
    numbers, scale = entries[..., :-SCALE_BYTES], entries[..., -SCALE_BYTES:]
    if entries.dtype == torch.int8:
        return (numbers * scale.view(torch.float32)).to(dtype)
    step, least = scale.view(torch.float16).float().unbind(dim=-1)
    numbers = torch.cat([numbers & STEPS, numbers >> 4], dim=-1)
    return (numbers * step[..., None] + least[..., None]).to(dtype)


def turned_back(sums: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """[..., D] weighted sums of ``stored_states`` of entries of a dtype, as of the states themselves."""
    return turned(sums.float()).to(sums.dtype) if stored == torch.uint8 else sums


def _int8_entries(states: torch.Tensor) -> torch.Tensor:
    """[..., D + SCALE_BYTES] int8."""
    scale = (states.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([(states / scale).round_().to(torch.int8), scale.view(torch.int8)], dim=-1)


def _int4_entries(states: torch.Tensor) -> torch.Tensor:
    """[..., D / 2 + SCALE_BYTES] uint8."""
    states = turned(states)
    least = states.amin(dim=-1, keepdim=True).half()
    step = ((states.amax(dim=-1, keepdim=True) - least) / STEPS).clamp(min=SMALLEST_STEP).half()
    numbers = ((states - least) / step).round_().clamp_(0, STEPS).to(torch.uint8)
    low, high = numbers.chunk(2, dim=-1)
    return torch.cat([low | high << 4, torch.cat([step, least], dim=-1).view(torch.uint8)], dim=-1)
