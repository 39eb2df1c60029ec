"""Window scores against explicit float64 loops and numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinkkv.kernels.window_scores.reference import window_scores
from thinkkv.sdk.plan import PromptView


@dataclass(frozen=True)
class Shape:
    tokens: int
    window: int
    dim: int
    kv_heads: int
    group: int

    def __str__(self) -> str:
        return f"N{self.tokens}-L{self.window}-D{self.dim}-KV{self.kv_heads}-G{self.group}"

    def inputs(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(self.kv_heads * self.group, self.window, self.dim, generator=generator)
        keys = torch.randn(self.kv_heads, self.tokens, self.dim, generator=generator)
        return queries, keys


SHAPES = [
    Shape(tokens=1, window=1, dim=80, kv_heads=1, group=1),
    Shape(tokens=1, window=1, dim=8, kv_heads=2, group=7),
    Shape(tokens=63, window=32, dim=80, kv_heads=2, group=3),
    Shape(tokens=63, window=63, dim=16, kv_heads=1, group=2),
    Shape(tokens=257, window=32, dim=16, kv_heads=3, group=1),
    Shape(tokens=257, window=1, dim=80, kv_heads=1, group=7),
]


def looped(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Eq. 12-13 as written, one number at a time, in float64."""
    (heads, window, _), (kv_heads, tokens, _) = queries.shape, keys.shape
    columns = torch.zeros(heads, tokens, dtype=torch.float64)
    for head in range(heads):
        own = keys[head // (heads // kv_heads)].double()
        for row in range(window):
            position = tokens - window + row
            logits = [float(queries[head, row].double() @ own[column]) * scale for column in range(position + 1)]
            highest = max(logits)
            weights = [math.exp(logit - highest) for logit in logits]
            for column, weight in enumerate(weights):
                columns[head, column] += weight / sum(weights) / window
    return columns


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_equal_a_float64_loop(shape: Shape) -> None:
    queries, keys = shape.inputs()
    found = window_scores(queries, keys, scale=shape.dim**-0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), looped(queries, keys, shape.dim**-0.5), rtol=1e-4, atol=1e-6)


def test_two_queries_by_hand() -> None:
    # Query 0 sees token 0 alone: [1, 0]. Query 1 sees logits 0 and ln 3: [1/4, 3/4]. The mean is [5/8, 3/8].
    queries = torch.tensor([[[1.0], [1.0]]])
    keys = torch.tensor([[[0.0], [math.log(3)]]])
    torch.testing.assert_close(window_scores(queries, keys, scale=1.0), torch.tensor([[0.625, 0.375]]))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 90),
    window=st.integers(1, 90),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    scale=st.sampled_from([0.01, 0.3, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_row_is_a_distribution(
    tokens: int, window: int, kv_heads: int, group: int, scale: float, dtype: torch.dtype
) -> None:
    queries, keys = Shape(tokens, min(window, tokens), 8, kv_heads, group).inputs()
    found = window_scores(queries.to(dtype), keys.to(dtype), scale=scale)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(kv_heads * group))


def test_newest_token_gets_the_newest_querys_attention_alone() -> None:
    queries, keys = Shape(tokens=20, window=4, dim=8, kv_heads=1, group=1).inputs()
    window = window_scores(queries, keys, scale=1.0)
    alone = window_scores(queries[:, -1:], keys, scale=1.0)
    torch.testing.assert_close(window[:, -1], alone[:, -1] / 4)


@pytest.mark.parametrize("observation_window", [5, 9, 10_000])
def test_prompt_view_uses_all_queries_of_a_prompt_shorter_than_the_window(observation_window: int) -> None:
    queries, keys = Shape(tokens=5, window=5, dim=8, kv_heads=2, group=2).inputs()
    prompt = PromptView(layer=0, layers=1, queries=queries, keys=keys, values=keys, scale=0.5)
    expected = looped(queries, keys, 0.5)
    torch.testing.assert_close(prompt.window_scores(observation_window).double(), expected, rtol=1e-4, atol=1e-6)


def test_prompt_view_observes_the_last_queries_only() -> None:
    queries, keys = Shape(tokens=12, window=12, dim=8, kv_heads=1, group=2).inputs()
    prompt = PromptView(layer=0, layers=1, queries=queries, keys=keys, values=keys, scale=0.5)
    expected = looped(queries[:, -3:], keys, 0.5)
    torch.testing.assert_close(prompt.window_scores(3).double(), expected, rtol=1e-4, atol=1e-6)


def test_group_mean_belongs_to_the_kv_head_of_its_queries() -> None:
    queries, keys = Shape(tokens=2, window=2, dim=8, kv_heads=2, group=2).inputs()
    prompt = PromptView(layer=0, layers=1, queries=queries, keys=keys, values=keys, scale=0.5)
    scores = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]])
    assert prompt.per_kv_head(scores).tolist() == [[0.25, 0.75], [0.5, 0.5]]
