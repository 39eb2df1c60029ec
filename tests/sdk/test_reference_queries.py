"""What reference queries get from all tokens, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.sdk import reference_queries as module
from thinkkv.sdk.reference_queries import ReferenceQueries


@given(
    seed=st.integers(0, 10_000), queries=st.integers(1, 40), tokens=st.integers(1, 40), size=st.sampled_from([0.1, 100])
)
def test_attention_is_that_to_all_tokens(seed: int, queries: int, tokens: int, size: float) -> None:
    torch.manual_seed(seed)
    query, keys, values = size * torch.randn(queries, 6), torch.randn(tokens, 6), torch.randn(tokens, 6)
    found = ReferenceQueries.of(query, keys, values, 0.5)
    q, k, v = (one.double().numpy() for one in (query, keys, values))
    logits = 0.5 * q @ k.T
    weighed = np.logaddexp.reduce(logits, axis=1)
    np.testing.assert_allclose(found.scaled.numpy(), 0.5 * q, rtol=1e-6)
    np.testing.assert_allclose(found.weighed.numpy(), weighed, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.outputs.numpy(), np.exp(logits - weighed[:, None]) @ v, rtol=1e-3, atol=1e-3)


def test_parts_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given = torch.randn(50, 4).bfloat16(), torch.randn(30, 4).bfloat16(), torch.randn(30, 4).bfloat16(), 0.5
    whole = ReferenceQueries.of(*given)
    monkeypatch.setattr(module, "ROWS", 7)
    in_parts = ReferenceQueries.of(*given)
    parts = list(in_parts.parts())
    assert [len(part.scaled) for part in parts] == [7] * 7 + [1]
    for name in ("scaled", "weighed", "outputs"):
        torch.testing.assert_close(getattr(in_parts, name), getattr(whole, name))
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(in_parts, name))
