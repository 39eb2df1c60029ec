"""Semantic vectors (Task-KV eq. 14-15) against float64 loops and numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from thinkkv.kernels.semantic_vector.reference import semantic_vector


def looped(weights: torch.Tensor, values: torch.Tensor, top: int) -> torch.Tensor:
    """Eq. 14-15 as written: the t largest weights, each times its value, added up in float64."""
    heads, kv_heads = len(weights), len(values)
    vectors = torch.zeros(heads, values.shape[2], dtype=torch.float64)
    for head in range(heads):
        row = weights[head].tolist()
        chosen = sorted(range(len(row)), key=lambda token: -row[token])[:top]
        for token in chosen:
            vectors[head] += row[token] * values[head // (heads // kv_heads), token].double()
    return vectors


@pytest.mark.parametrize(
    ("tokens", "top", "dim", "kv_heads", "group"),
    [(1, 256, 80, 1, 1), (63, 16, 80, 2, 3), (257, 256, 8, 3, 1), (257, 1, 8, 1, 7), (40, 256, 16, 2, 2)],
    ids=lambda value: str(value),
)
def test_vectors_equal_a_float64_loop(tokens: int, top: int, dim: int, kv_heads: int, group: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(kv_heads * group, tokens, generator=generator).softmax(dim=1)
    values = torch.randn(kv_heads, tokens, dim, generator=generator)
    found = semantic_vector(weights, values, top=top)
    torch.testing.assert_close(found.double(), looped(weights, values, top), rtol=1e-5, atol=1e-6)


def test_top_two_of_three_by_hand() -> None:
    # The two largest weights .5 and .3 take (1, 0) and (0, 1); nothing is renormalised, (5, 5) does not count.
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    values = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    torch.testing.assert_close(semantic_vector(weights, values, top=2), torch.tensor([[0.5, 0.3]]))


def test_all_tokens_give_the_heads_whole_output() -> None:
    weights = torch.rand(4, 30).softmax(dim=1)
    values = torch.randn(2, 30, 8)
    expected = weights @ values.repeat_interleave(2, dim=0)
    torch.testing.assert_close(semantic_vector(weights, values, top=30), expected.diagonal(dim1=0, dim2=1).T)


def test_half_precision_values_are_added_in_float32() -> None:
    weights = torch.full((1, 4096), 1 / 4096)
    values = torch.ones(1, 4096, 4, dtype=torch.bfloat16)
    found = semantic_vector(weights, values, top=4096)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones(1, 4))
