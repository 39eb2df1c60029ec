"""States turned by a Hadamard matrix, and what that does to values in four or five bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conformance.stored_reference import in_steps
from tests.kernels.sylvester import sylvester
from thinkkv.kernels.entries import entries_of, states_of
from thinkkv.kernels.hadamard import block_of, turned


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dim=st.integers(1, 64).map(lambda quarters: 4 * quarters),
    seed=st.integers(0, 2**20),
)
def test_turning_is_a_product_with_sylvesters_matrix(shape: list[int], dim: int, seed: int) -> None:
    states = torch.randn(*shape, dim, generator=torch.Generator().manual_seed(seed))
    error = turned(states).double() - states.double() @ sylvester(dim)
    # Every stage rounds once, and so do the factor and the product with it; nothing makes a state longer.
    roundings = block_of(dim).bit_length() + 1
    assert (error.norm(dim=-1) <= 1.001 * roundings * 2**-24 * states.double().norm(dim=-1)).all()


@pytest.mark.parametrize(("stored", "steps"), [(torch.uint8, 15), (torch.int16, 31)], ids=["int4", "int5"])
@pytest.mark.parametrize("dim", [64, 128])
def test_one_large_dimension_costs_the_others_less(dim: int, stored: torch.dtype, steps: int) -> None:
    values = torch.randn(500, dim, generator=torch.Generator().manual_seed(3))
    values[:, 5] *= 12
    found = states_of(entries_of(values, stored), torch.float32)
    as_they_are = (in_steps(values, steps) - values).square().mean()
    assert (found - values).square().mean() < as_they_are / 2
