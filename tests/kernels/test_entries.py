"""Small entries: how far they are from what they stand for, and what they do with odd numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.kernels.sylvester import sylvester
from thinkkv.kernels.entries import (
    BITS,
    LARGEST,
    SCALE_BYTES,
    entries_of,
    entry_bytes,
    multiple_of,
    states_of,
    steps_of,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = list(BITS)
"""Dtypes of int8, int5 and int4 entries."""


def as_stored(states: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """[..., D] float64: the numbers that an entry rounds."""
    return states.double() @ sylvester(states.shape[-1]) if stored != torch.int8 else states.double()


def half_a_step(exact: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """[..., 1] float64: by how much a number of an entry may be off."""
    if stored == torch.int8:
        return exact.abs().amax(dim=-1, keepdim=True) / LARGEST / 2
    least, most = exact.aminmax(dim=-1, keepdim=True)
    # Step and least number are rounded to float16 themselves, the step up to ``steps`` times.
    steps = steps_of(stored)
    return (most - least) / steps / 2 + (most - least + least.abs()) * 2**-11 + steps * 2**-24


@pytest.mark.parametrize("stored", SMALL, ids=str)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dim=st.sampled_from([4, 16, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 300.0]),
    mean=st.sampled_from([0.0, -3.0, 200.0]),
    seed=st.integers(0, 1000),
)
def test_no_number_is_off_by_more_than_half_a_step(
    stored: torch.dtype, shape: list[int], dim: int, dtype: torch.dtype, magnitude: float, mean: float, seed: int
) -> None:
    assume(dim % multiple_of(stored) == 0)
    states = (torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed)) * magnitude + mean).to(dtype)
    entries = entries_of(states, stored)
    assert entries.shape == (*shape, (dim * BITS[stored] // 8 + SCALE_BYTES) // stored.itemsize)
    assert entries.dtype == stored
    assert entries[..., 0].numel() * entry_bytes(dim, stored) == entries.nbytes
    exact, found = as_stored(states, stored), as_stored(states_of(entries, torch.float32), stored)
    assert ((found - exact).abs() <= half_a_step(exact, stored) * 1.0002).all()
    assert states_of(entries, dtype).dtype == dtype


def test_int4_numbers_lie_two_to_a_byte_behind_them_step_and_least() -> None:
    turned = torch.tensor([-2.0, -1.5, 0.0, 5.5, 1.0, 2.0, 3.0, 4.0, 0.5, -0.5, 0.0, -1.0])
    states = (turned.double() @ sylvester(12)).float()  # exact: multiples of a half
    entry = entries_of(states, torch.uint8).numpy()
    numbers = [[byte & 15, byte >> 4] for byte in entry[:6].tolist()]
    assert numbers == [[0, 10], [1, 12], [4, 5], [15, 3], [6, 4], [8, 2]]
    assert entry[6:].view(np.float16).tolist() == [0.5, -2.0]
    assert torch.equal(states_of(torch.from_numpy(entry), torch.float32), states)


def test_fifth_bits_lie_eight_to_a_byte_behind_the_low_ones() -> None:
    turned = torch.tensor([-4.0, 11.5, 4.0, 3.5, 0.0, -4.0, 4.5, 11.0, -3.5, 4.0, 8.0, -1.0, 11.5, 0.5, 3.5, 4.0])
    states = (turned.double() @ sylvester(16)).float()  # exact: multiples of a quarter
    entry = entries_of(states, torch.int16).view(torch.uint8).numpy()
    numbers = [0, 31, 16, 15, 8, 0, 17, 30, 1, 16, 24, 6, 31, 9, 15, 16]
    assert entry[:8].tolist() == [
        one % 16 + other % 16 * 16 for one, other in zip(numbers[:8], numbers[8:], strict=True)
    ]
    assert entry[8:10].tolist() == [0b11000110, 0b10010110]
    assert entry[10:].view(np.float16).tolist() == [0.5, -4.0]
    assert torch.equal(states_of(torch.from_numpy(entry).view(torch.int16), torch.float32), states)


def test_states_are_their_own_entries() -> None:
    states = torch.randn(3, 64)
    assert states_of(states, torch.float32) is entries_of(states, torch.float32) is states
    assert entry_bytes(64, torch.bfloat16) == states.bfloat16().nbytes // 3


@pytest.mark.parametrize("stored", SMALL, ids=str)
def test_zeros_stay_zeros(stored: torch.dtype) -> None:
    assert not states_of(entries_of(torch.zeros(2, 64), stored), torch.float32).any()


@pytest.mark.parametrize("stored", SMALL, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_hidden_and_stays_in_its_token(odd: float, stored: torch.dtype) -> None:
    states = torch.ones(3, 64)
    states[1, 5] = odd
    read = states_of(entries_of(states, stored), torch.float32)
    assert not read[1].isfinite().all()
    assert read[[0, 2]].isfinite().all()
