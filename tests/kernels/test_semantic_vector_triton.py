"""The Triton semantic vectors, interpreted where there is no GPU, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.closeness import assert_close
from tests.kernels.accuracy import DEVICE, RMS
from thinkkv.kernels.semantic_vector import reference
from thinkkv.kernels.semantic_vector.triton import semantic_vector


@dataclass(frozen=True)
class Shape:
    tokens: int
    top: int
    dim: int
    kv_heads: int
    group: int

    def __str__(self) -> str:
        return f"N{self.tokens}-t{self.top}-D{self.dim}-KV{self.kv_heads}-G{self.group}"

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        weights = torch.randn(self.kv_heads * self.group, self.tokens, generator=generator).softmax(dim=1)
        values = torch.randn(self.kv_heads, self.tokens, self.dim, generator=generator)
        return weights.to(DEVICE), values.to(DEVICE, dtype)


SHAPES = [
    Shape(tokens=1, top=256, dim=80, kv_heads=1, group=1),
    Shape(tokens=63, top=16, dim=64, kv_heads=2, group=3),
    Shape(tokens=257, top=256, dim=96, kv_heads=3, group=1),
    Shape(tokens=257, top=1, dim=128, kv_heads=1, group=7),
    Shape(tokens=64, top=33, dim=256, kv_heads=2, group=2),
]


def exact(weights: torch.Tensor, values: torch.Tensor, top: int) -> torch.Tensor:
    """Eq. 14-15 with all weights but the t largest set to zero, in float64; no two weights are equal."""
    smallest = weights.sort(dim=1, descending=True).values[:, :top][:, -1:]
    kept = torch.where(weights >= smallest, weights, 0).double()
    repeated = values.double().repeat_interleave(len(weights) // len(values), dim=0)
    return torch.einsum("hn,hnd->hd", kept, repeated)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums start as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: allocate(*shape, **options).fill_(float("nan")))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", RMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectors_equal_float64(shape: Shape, dtype: torch.dtype) -> None:
    weights, values = shape.inputs(dtype)
    found = semantic_vector(weights, values, top=shape.top)
    assert found.dtype == torch.float32
    assert_close(found, exact(weights, values, shape.top), rms=RMS[dtype])


def test_vectors_equal_the_reference() -> None:
    weights, values = Shape(tokens=63, top=16, dim=80, kv_heads=2, group=3).inputs()
    expected = reference.semantic_vector(weights, values, top=16)
    assert_close(semantic_vector(weights, values, top=16), expected, rms=1e-5)


def test_the_same_bits_every_time() -> None:
    weights, values = Shape(tokens=257, top=200, dim=64, kv_heads=1, group=2).inputs(torch.bfloat16)
    first, second = (semantic_vector(weights, values, top=200) for _ in range(2))
    assert torch.equal(first, second)


def test_strided_values_are_read_where_they_are() -> None:
    weights, values = Shape(tokens=40, top=30, dim=80, kv_heads=2, group=3).inputs()
    arena = torch.full((60, 2, 96), float("nan"), device=DEVICE)
    arena[:40, :, :80] = values.transpose(0, 1)
    found = semantic_vector(weights, arena[:40, :, :80].transpose(0, 1), top=30)
    assert_close(found, exact(weights, values, 30), rms=1e-5)
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(semantic_vector(weights, turned, top=30), exact(weights, values, 30), rms=1e-5)


def test_values_that_were_not_chosen_do_not_count() -> None:
    weights, values = Shape(tokens=40, top=20, dim=16, kv_heads=1, group=1).inputs()
    weights[0, 0] = 0.0  # idle lanes of a program point at token 0
    poisoned = values.clone()
    poisoned[0, weights[0].argsort()[:20]] = float("nan")
    assert_close(semantic_vector(weights, poisoned, top=20), exact(weights, values, 20), rms=1e-5)


@pytest.mark.parametrize("strides", [(2**30, 64, 1), (64, 2**29, 1)], ids=["heads", "tokens"])
def test_offsets_beyond_32_bits(strides: tuple[int, int, int]) -> None:
    # Strides fit in 32 bits, the last row's offset does not. Only touched pages of the 4 GiB are resident.
    weights, values = Shape(tokens=5, top=4, dim=64, kv_heads=3, group=1).inputs(torch.float16)
    far = torch.empty(2**31 + 5 * 64, dtype=torch.float16, device=DEVICE).as_strided((3, 5, 64), strides)
    far.copy_(values)
    assert_close(semantic_vector(weights, far, top=4), exact(weights, values, 4), rms=5e-3)


@settings(deadline=None, max_examples=8)
@given(
    tokens=st.integers(1, 140),
    top=st.integers(1, 300),
    dim=st.sampled_from([1, 8, 20, 64]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dtype=st.sampled_from(list(RMS)),
)
def test_any_shape_equals_float64(
    tokens: int, top: int, dim: int, kv_heads: int, group: int, dtype: torch.dtype
) -> None:
    weights, values = Shape(tokens, top, dim, kv_heads, group).inputs(dtype)
    assert_close(semantic_vector(weights, values, top=top), exact(weights, values, top), rms=RMS[dtype])
