"""What an entry of an arena is: D numbers of the model's dtype, or D small integers and what they are multiples of.

An int8 entry is its numbers, then their scale as the four bytes of a float32. Entries of four or five bits a number
(int4, int5) are of turned states (``hadamard.py``): the low four bits of their numbers two to a byte, the first half of
the numbers in the low ones; of int5 the fifth bits, eight to a byte, the first number's lowest; then their step and
their least number, a float16 each.
So an entry is one piece of memory whatever it holds: what moves entries need not know, only what writes and reads them.
Which they are is said by the dtype that the memory is seen as: int8; uint8 for int4; int16 for int5.
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
BITS = {torch.int8: 8, torch.int16: 5, torch.uint8: 4}
"""Of a number of a small entry, by the dtype of the entry."""
SMALLEST_STEP = 2.0**-24
"""Of float16, the numbers below normal ones included."""


def steps_of(stored: torch.dtype) -> int:
    """Integers of int4 and int5 go from 0 to so many."""
    return 2 ** BITS[stored] - 1


def multiple_of(stored: torch.dtype) -> int:
    """What D must be a multiple of, so that the numbers fill their bytes and what is behind them is aligned."""
    return {torch.int16: 16, torch.uint8: 4, torch.int8: 4}.get(stored, 1)


def is_turned(stored: torch.dtype) -> bool:
    """Whether entries of a dtype are of turned states."""
    return BITS.get(stored, 8) < 8


def entry_bytes(dim: int, stored: torch.dtype) -> int:
    """Bytes of one token's key, or value, in one KV head.

    Args:
        dim: D.
        stored: of the model, int8 for int8 entries, uint8 for int4 entries, int16 for int5 entries.
    """
    return dim * BITS[stored] // 8 + SCALE_BYTES if stored in BITS else dim * stored.itemsize


def entries_of(states: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What an arena of dtype ``stored`` holds of [..., D] states, D a ``multiple_of``: themselves, or small entries."""
    if stored == torch.int8:
        return _int8_entries(states.float())
    return _turned_entries(states.float(), stored) if stored in BITS else states


def states_of(entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The states in entries: [..., D], the entries themselves where they are that.

    Args:
        entries: as they are stored.
        dtype: of the model.
    """
    return turned_back(stored_states(entries, dtype), entries.dtype)


def stored_states(entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As ``states_of``, but for int4 and int5 entries, of which it gives the turned states."""
    if entries.dtype not in BITS:
        return entries
    stored, entries = entries.dtype, entries.view(torch.uint8)
    numbers, scale = entries[..., :-SCALE_BYTES], entries[..., -SCALE_BYTES:]
    if stored == torch.int8:
        return (numbers.view(torch.int8) * scale.view(torch.float32)).to(dtype)
    step, least = scale.view(torch.float16).float().unbind(dim=-1)
    return (_unpacked(numbers, stored) * step[..., None] + least[..., None]).to(dtype)


def turned_back(sums: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """[..., D] weighted sums of ``stored_states`` of entries of a dtype, as of the states themselves."""
    return turned(sums.float()).to(sums.dtype) if is_turned(stored) else sums


def _int8_entries(states: torch.Tensor) -> torch.Tensor:
    """[..., D + SCALE_BYTES] int8."""
    scale = (states.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([(states / scale).round_().to(torch.int8), scale.view(torch.int8)], dim=-1)


def _turned_entries(states: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """[..., ``entry_bytes``], seen as ``stored``."""
    states, steps = turned(states), steps_of(stored)
    least = states.amin(dim=-1, keepdim=True).half()
    step = ((states.amax(dim=-1, keepdim=True) - least) / steps).clamp(min=SMALLEST_STEP).half()
    numbers = ((states - least) / step).round_().clamp_(0, steps).to(torch.uint8)
    scale = torch.cat([step, least], dim=-1).view(torch.uint8)
    return torch.cat([*_packed(numbers, stored), scale], dim=-1).view(stored)


def _packed(numbers: torch.Tensor, stored: torch.dtype) -> tuple[torch.Tensor, ...]:
    """[..., D] uint8 as the bytes that hold them: the low bits', and of int5 the fifth bits'."""
    first, second = (numbers & 15).chunk(2, dim=-1)
    low = first | second << 4
    if BITS[stored] == 4:
        return (low,)
    fifth = (numbers >> 4).unflatten(-1, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=numbers.device)
    return low, fifth.sum(dim=-1, dtype=torch.uint8)


def _unpacked(packed: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """[..., D] uint8, the numbers in such bytes."""
    low = packed[..., : packed.shape[-1] * 4 // BITS[stored]]
    numbers = torch.cat([low & 15, low >> 4], dim=-1)
    if BITS[stored] == 4:
        return numbers
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    fifth = packed[..., low.shape[-1] :, None] >> place & 1
    return numbers | fifth.flatten(-2) << 4
