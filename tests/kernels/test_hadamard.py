"""States turned by a Hadamard matrix, and what that does to values in int4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.kernels.entries import entries_of, states_of
from thinkkv.kernels.hadamard import hadamard, turned

CPU = torch.device("cpu")


@given(dim=st.integers(1, 64).map(lambda quarters: 4 * quarters))
def test_the_matrix_is_its_own_inverse_and_spreads_what_it_turns(dim: int) -> None:
    matrix, power = hadamard(dim, CPU).double(), dim & -dim  # the largest power of two in it
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    sizes = matrix.abs()
    torch.testing.assert_close(sizes.amax(), torch.tensor(power**-0.5, dtype=torch.float64))
    assert ((sizes == 0) | (sizes == sizes.amax())).all()
    assert ((sizes > 0).sum(dim=1) == power).all()


@given(
    dim=st.sampled_from([4, 64, 80, 96, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
def test_turning_twice_changes_nothing_but_rounding(dim: int, dtype: torch.dtype, seed: int) -> None:
    matrix = hadamard(dim, CPU)
    states = torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    once = turned(states, matrix)
    assert once.dtype == dtype
    # Two roundings to half a step of the dtype, and two sums in float32. By the length of a state: a single dimension's
    # error depends on the seed.
    steps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    lengths = states.double().norm(dim=-1)
    assert ((turned(once, matrix).double() - states.double()).norm(dim=-1) <= steps * lengths).all()


@pytest.mark.parametrize("dim", [64, 128])
def test_one_large_dimension_costs_the_others_less(dim: int) -> None:
    values = torch.randn(500, dim, generator=torch.Generator().manual_seed(3))
    values[:, 5] *= 12
    matrix = hadamard(dim, CPU)

    def rounded(states: torch.Tensor) -> torch.Tensor:
        return states_of(entries_of(states, torch.uint8), torch.float32)

    as_they_are = (rounded(values) - values).square().mean()
    assert (turned(rounded(turned(values, matrix)), matrix) - values).square().mean() < as_they_are / 2
