"""Summaries of evicted tokens against float64 and against what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.sdk import reference_queries
from thinkkv.sdk.reference_queries import ReferenceQueries
from thinkkv.sdk.summaries import grouped, summarize


class TestGroups:
    @given(seed=st.integers(0, 10_000), points=st.integers(1, 30), count=st.integers(1, 40))
    def test_they_are_disjoint_and_around_their_means(self, seed: int, points: int, count: int) -> None:
        torch.manual_seed(seed)
        found = torch.randn(points, 3)
        group, middle = grouped(found, count)
        assert len(middle) <= min(points, count)
        assert group.unique().tolist() == list(range(len(middle)))
        for number, mean in enumerate(middle):
            torch.testing.assert_close(found[group == number].mean(dim=0), mean)

    def test_points_apart_are_told_apart(self) -> None:
        torch.manual_seed(0)
        centers = 100 * torch.eye(4)
        found = centers.repeat_interleave(5, dim=0) + torch.randn(20, 4)
        group, _ = grouped(found, 4)
        assert group.unflatten(0, (4, 5)).tolist() == [[number] * 5 for number in range(4)]


class TestSummaries:
    @given(data=st.data())
    def test_keys_are_the_weighted_least_squares_of_the_logarithm(self, data: st.DataObject) -> None:
        tokens, count = data.draw(st.integers(2, 25)), data.draw(st.integers(1, 5))
        evicted = torch.tensor(sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1))))
        ridge = data.draw(st.floats(1e-2, 10))
        torch.manual_seed(data.draw(st.integers(0, 10_000)))
        queries, keys, values = torch.randn(30, 6), torch.randn(tokens, 6), torch.randn(tokens, 6)
        reference = ReferenceQueries.of(queries, keys, values, 0.5)
        places, found, means = summarize(reference, keys, values, evicted, count=count, ridge=ridge)
        group, _ = grouped(keys[evicted], count)
        q, k, v = (one.double().numpy() for one in (0.5 * queries, keys, values))
        weights = np.exp(q @ k.T)
        shares = weights / weights.sum(axis=1, keepdims=True)
        assert len(found) == len(means) == len(set(places.tolist())) == len(group.unique())
        for number, (place, key, value) in enumerate(zip(places.tolist(), found, means, strict=True)):
            mine = evicted[group == number].numpy()
            mean = k[mine].mean(axis=0)
            share = shares[:, mine].sum(axis=1)
            left = np.sqrt(share)[:, None] * q
            unit = (left**2).sum(axis=0).mean()
            right = np.sqrt(share) * (np.log(weights[:, mine].sum(axis=1)) - q @ mean)
            change = np.linalg.lstsq(
                np.concatenate([left, np.sqrt(ridge * unit) * np.eye(6)]),
                np.concatenate([right, np.zeros(6)]),
                rcond=None,
            )[0]
            np.testing.assert_allclose(key.numpy(), mean + change, rtol=1e-3, atol=1e-3)
            taken = shares[:, mine].sum(axis=0)
            np.testing.assert_allclose(value.numpy(), taken @ v[mine] / taken.sum(), rtol=1e-3, atol=1e-4)
            assert place in mine
            apart = np.linalg.norm(k - mean, axis=1)
            assert apart[place] <= apart[mine].min() + 1e-4  # two tokens are as far from their middle

    def test_a_summary_weighs_as_much_as_the_tokens_that_it_stands_for(self) -> None:
        """Exactly, where the logarithm is linear: like keys, and queries with a part in common that tells how many."""
        torch.manual_seed(0)
        queries = torch.cat([torch.randn(200, 3), torch.ones(200, 1)], dim=1)
        keys = torch.cat([torch.randn(1, 4).repeat(7, 1), torch.randn(5, 4)])
        values = torch.randn(12, 4)
        reference = ReferenceQueries.of(queries, keys, values, 1.0)
        _, key, value = summarize(reference, keys, values, torch.arange(7), count=1, ridge=1e-7)
        wanted = (queries @ keys.T).softmax(dim=1) @ values
        found = (queries @ torch.cat([key, keys[7:]]).T).softmax(dim=1) @ torch.cat([value, values[7:]])
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)

    def test_many_queries_are_taken_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        queries, keys, values = torch.randn(50, 4), torch.randn(30, 4), torch.randn(30, 4)

        def summaries() -> tuple[torch.Tensor, ...]:
            reference = ReferenceQueries.of(queries, keys, values, 0.5)
            return summarize(reference, keys, values, torch.arange(3, 20), count=3, ridge=0.1)

        whole = summaries()
        monkeypatch.setattr(reference_queries, "ROWS", 7)
        for found, expected in zip(summaries(), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_tokens_that_nobody_looks_at_are_summarised_by_their_mean(self) -> None:
        keys = torch.tensor([[9.0, 0], [-90, 1], [-90, -1]])
        values = torch.tensor([[1.0, 1], [2, 0], [4, 0]])
        reference = ReferenceQueries.of(torch.tensor([[9.0, 0]] * 4), keys, values, 1.0)
        _, key, value = summarize(reference, keys, values, torch.tensor([1, 2]), count=1, ridge=1.0)
        assert key.isfinite().all()
        torch.testing.assert_close(value, torch.tensor([[3.0, 0]]))
