"""The Triton window scores, interpreted where there is no GPU, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.closeness import assert_close
from tests.kernels.accuracy import DEVICE, RMS
from thinkkv.kernels.window_scores import reference
from thinkkv.kernels.window_scores.triton import window_scores


@dataclass(frozen=True)
class Shape:
    tokens: int
    window: int
    dim: int
    kv_heads: int
    group: int

    def __str__(self) -> str:
        return f"N{self.tokens}-L{self.window}-D{self.dim}-KV{self.kv_heads}-G{self.group}"

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)
        queries = torch.randn(self.kv_heads * self.group, self.window, self.dim, generator=generator)
        keys = torch.randn(self.kv_heads, self.tokens, self.dim, generator=generator)
        return queries.to(DEVICE, dtype), keys.to(DEVICE, dtype)


SHAPES = [
    Shape(tokens=1, window=1, dim=80, kv_heads=1, group=1),
    Shape(tokens=32, window=32, dim=64, kv_heads=2, group=3),
    Shape(tokens=33, window=32, dim=96, kv_heads=1, group=7),
    Shape(tokens=63, window=5, dim=80, kv_heads=3, group=1),
    Shape(tokens=63, window=63, dim=64, kv_heads=2, group=1),
    Shape(tokens=257, window=32, dim=128, kv_heads=2, group=3),
    Shape(tokens=257, window=1, dim=80, kv_heads=1, group=7),
    Shape(tokens=130, window=64, dim=256, kv_heads=1, group=2),
    Shape(tokens=130, window=100, dim=8, kv_heads=1, group=2),
]


def exact(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Eq. 12-13 with all of [Hq, L, N] in float64."""
    window, tokens = queries.shape[1], keys.shape[1]
    repeated = keys.double().repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    logits = torch.einsum("hld,hnd->hln", queries.double(), repeated) * scale
    position = torch.arange(tokens - window, tokens, device=keys.device)
    hidden = torch.arange(tokens, device=keys.device) > position[:, None]
    return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1).mean(dim=1)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and scratch memory start as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: allocate(*shape, **options).fill_(float("nan")))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", RMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_equal_float64(shape: Shape, dtype: torch.dtype) -> None:
    queries, keys = shape.inputs(dtype)
    found = window_scores(queries, keys, scale=shape.dim**-0.5)
    assert found.dtype == torch.float32
    assert_close(found, exact(queries, keys, shape.dim**-0.5), rms=RMS[dtype])
    torch.testing.assert_close(found.sum(dim=1), torch.ones_like(found[:, 0]))


def test_scores_equal_the_reference() -> None:
    queries, keys = Shape(tokens=63, window=32, dim=80, kv_heads=2, group=3).inputs()
    assert_close(window_scores(queries, keys, scale=0.1), reference.window_scores(queries, keys, scale=0.1), rms=1e-5)


def test_strided_inputs_are_read_where_they_are() -> None:
    # As a prompt's tensors come: [N, heads, D] transposed, the window a slice, the keys a part of a poisoned arena.
    queries, keys = Shape(tokens=140, window=140, dim=80, kv_heads=2, group=3).inputs()
    arena = torch.full((200, 2, 96), float("nan"), device=DEVICE)
    arena[:140, :, :80] = keys.transpose(0, 1)
    strided = queries.transpose(0, 1).contiguous().transpose(0, 1)[:, -32:]
    found = window_scores(strided, arena[:140, :, :80].transpose(0, 1), scale=0.1)
    assert_close(found, exact(queries[:, -32:], keys, 0.1), rms=1e-5)


def test_a_strided_last_dimension_is_allowed() -> None:
    queries, keys = Shape(tokens=40, window=8, dim=16, kv_heads=1, group=2).inputs()
    turned = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (queries, keys))
    assert_close(window_scores(*turned, scale=0.3), exact(queries, keys, 0.3), rms=1e-5)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    queries, keys = Shape(tokens=140, window=32, dim=64, kv_heads=1, group=1).inputs()
    found = window_scores(queries, keys, scale=20.0)  # logits of +-500
    assert_close(found, exact(queries, keys, 20.0), rms=1e-4)  # 500 itself has an error of 3e-5 in float32


@pytest.mark.parametrize("strides", [(2**30, 64, 1), (64, 2**29, 1)], ids=["heads", "tokens"])
def test_offsets_beyond_32_bits(strides: tuple[int, int, int]) -> None:
    # Strides fit in 32 bits, the last row's offset does not. Only touched pages of the 4 GiB are resident.
    queries, keys = Shape(tokens=5, window=5, dim=64, kv_heads=3, group=1).inputs(torch.float16)
    storage = torch.empty(2**31 + 5 * 64, dtype=torch.float16, device=DEVICE)
    for tensor in (queries, keys):
        far = storage.as_strided((3, 5, 64), strides)
        far.copy_(tensor)
        found = window_scores(far if tensor is queries else queries, far if tensor is keys else keys, scale=0.1)
        assert_close(found, exact(queries, keys, 0.1), rms=5e-3)


@settings(deadline=None, max_examples=8)
@given(
    tokens=st.integers(1, 140),
    window=st.integers(1, 70),
    dim=st.sampled_from([8, 20, 64]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    scale=st.sampled_from([0.01, 0.3, 3.0]),
    dtype=st.sampled_from(list(RMS)),
)
def test_any_shape_gives_float64s_distribution(
    tokens: int, window: int, dim: int, kv_heads: int, group: int, scale: float, dtype: torch.dtype
) -> None:
    queries, keys = Shape(tokens, min(window, tokens), dim, kv_heads, group).inputs(dtype)
    found = window_scores(queries, keys, scale=scale)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones_like(found[:, 0]))
    assert_close(found, exact(queries, keys, scale), rms=RMS[dtype])
