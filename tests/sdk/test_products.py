"""Products of float32 copies of bfloat16: against float64, and the setting of the process that they need."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.sdk.products import products_of

MATMUL = getattr(torch.backends.mkldnn, "matmul", None)
settable = pytest.mark.skipif(MATMUL is None, reason="torch has no precision of oneDNN's products before 2.9")


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 200), inner=st.integers(1, 130), columns=st.integers(1, 300))
def test_products_of_bfloat16_are_those_of_float64(seed: int, rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(seed)
    left, right = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16()
    with products_of(left.dtype):
        found = left.float() @ right.float()
    size = left.double().abs() @ right.double().abs()
    assert ((found.double() - left.double() @ right.double()).abs() <= 1e-6 * size + 1e-30).all()


@settable
def test_the_setting_is_restored_whatever_happens() -> None:
    assert MATMUL is not None
    before = MATMUL.fp32_precision
    with pytest.raises(KeyError, match="bf16"), products_of(torch.bfloat16):
        raise KeyError(MATMUL.fp32_precision)
    assert MATMUL.fp32_precision == before


@settable
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_finer_states_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    assert MATMUL is not None
    before = MATMUL.fp32_precision
    with products_of(dtype):
        assert MATMUL.fp32_precision == before


def test_torch_without_such_a_setting_multiplies_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", object())
    with products_of(torch.bfloat16):
        assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 1), torch.full((2, 1), 3.0))
