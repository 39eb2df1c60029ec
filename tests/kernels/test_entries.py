"""Small entries: how far they are from what they stand for, and what they do with odd numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.kernels.entries import LARGEST, SCALE_BYTES, entry_bytes, quantize, states_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dim=st.sampled_from([4, 16, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_no_number_is_off_by_more_than_half_a_step(
    shape: list[int], dim: int, dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    states = (torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    entries = quantize(states)
    assert entries.shape == (*shape, dim + SCALE_BYTES)
    assert entries.dtype == torch.int8
    assert entries[..., 0].numel() * entry_bytes(dim, dtype, quantized=True) == entries.nbytes
    step = states.double().abs().amax(dim=-1, keepdim=True) / LARGEST
    assert ((states_of(entries, torch.float32).double() - states.double()).abs() <= step * 0.5001).all()
    assert states_of(entries, dtype).dtype == dtype


def test_states_are_their_own_entries() -> None:
    states = torch.randn(3, 64)
    assert states_of(states, torch.float32) is states
    assert entry_bytes(64, torch.bfloat16, quantized=False) == states.bfloat16().nbytes // 3


def test_zeros_stay_zeros() -> None:
    assert not states_of(quantize(torch.zeros(2, 64)), torch.float32).any()


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden_and_stays_in_its_token(odd: float) -> None:
    states = torch.ones(3, 64)
    states[1, 5] = odd
    read = states_of(quantize(states), torch.float32)
    assert not read[1].isfinite().all()
    assert read[[0, 2]].isfinite().all()
