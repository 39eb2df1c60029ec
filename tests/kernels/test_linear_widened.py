"""Many rows of half precision in float32, block by block, against float64; and when that is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.accuracy import RMS
from tests.kernels.test_linear_native import amid_nan
from thinkkv.kernels.linear import native, reference, widened

HALVES = [torch.bfloat16, torch.float16]


@given(
    rows=st.sampled_from([1, 9, 31, 32, 33, 100]),
    size=st.sampled_from([1, 7, 64, 255]),
    outs=st.sampled_from([1, 5, 64, 130]),
    blocks=st.sampled_from([(1, 1), (32, 1000), (7, 300), (1024, 1 << 20)]),
    dtype=st.sampled_from(HALVES),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_float64_whatever_the_blocks(
    rows: int, size: int, outs: int, blocks: tuple[int, int], dtype: torch.dtype, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = (amid_nan(shape, dtype, generator) for shape in ((rows, size), (outs, size)))
    bias = amid_nan((outs,), dtype, generator) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "BLOCK_ROWS", blocks[0])
        patch.setattr(widened, "BLOCK_WEIGHTS", blocks[1])
        found = widened.product(inputs, weight, bias)
    expected = reference.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert (found.double() - expected).norm() <= RMS[dtype] * expected.norm() + 1e-6


def test_inputs_of_any_strides_and_leading_dimensions_are_read_rightly() -> None:
    inputs, weight = torch.randn(24, 2, 9).bfloat16().permute(1, 2, 0), torch.randn(10, 24).bfloat16()
    torch.testing.assert_close(widened.product(inputs, weight, None), reference.linear(inputs, weight))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is widened, on a processor where that pays."""
    found: list[Any] = []
    product = widened.product
    monkeypatch.setattr(widened, "product", lambda *arguments: found.append(arguments) or product(*arguments))
    monkeypatch.setattr(widened, "pays_for", lambda dtype: dtype in HALVES)
    return found


@pytest.mark.parametrize(
    ("rows", "dtype", "times"),
    [(8, torch.bfloat16, 0), (9, torch.bfloat16, 1), (9, torch.float16, 1), (9, torch.float32, 0)],
    ids=str,
)
def test_many_rows_are_widened_where_that_pays(
    rows: int, dtype: torch.dtype, times: int, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, weight = torch.randn(rows, 16).to(dtype), torch.randn(6, 16).to(dtype)
    torch.testing.assert_close(native.linear(inputs, weight), reference.linear(inputs, weight))
    assert len(calls) == times
    monkeypatch.setattr(widened, "pays_for", lambda _: False)
    native.linear(inputs, weight)
    assert len(calls) == times


def test_gradients_autocast_and_compilers_get_torchs_product(calls: list[Any]) -> None:
    inputs, weight = torch.randn(9, 16).bfloat16(), torch.randn(6, 16).bfloat16()
    native.linear(inputs, weight.clone().requires_grad_()).sum().backward()  # type: ignore[no-untyped-call]
    with torch.autocast("cpu", torch.float16):
        assert native.linear(inputs, weight).dtype == torch.float16
    torch.compile(native.linear, backend="eager", fullgraph=True)(inputs, weight)
    assert calls == []


def test_torch_is_asked_what_its_library_takes() -> None:
    assert not widened.pays_for(torch.float32)
    for dtype in HALVES:
        takes = getattr(torch.ops.mkldnn, widened._LIBRARY_TAKES[dtype])()
        assert widened.pays_for(dtype) is not takes
