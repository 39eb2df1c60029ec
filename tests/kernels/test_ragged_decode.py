"""Attention of new tokens over cache rows against a float64 loop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from thinkkv.kernels.ragged_decode import reference
from thinkkv.kernels.ragged_decode.reference import causal_tail, decode_rows


@dataclass(frozen=True)
class Shape:
    rows: int
    group: int
    new: int
    length: int
    dim: int

    def __str__(self) -> str:
        return f"R{self.rows}-G{self.group}-Q{self.new}-T{self.length}-D{self.dim}"

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.length)
        query = torch.randn(self.rows, self.group, self.new, self.dim, generator=generator)
        keys, values = torch.randn(2, self.rows, self.length, self.dim, generator=generator)
        return query, keys, values


SHAPES = [
    Shape(rows=1, group=1, new=1, length=1, dim=80),
    Shape(rows=3, group=7, new=1, length=63, dim=80),
    Shape(rows=2, group=3, new=5, length=5, dim=16),
    Shape(rows=4, group=2, new=17, length=257, dim=8),
    Shape(rows=1, group=4, new=2, length=1000, dim=16),
]


def looped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """Every query of every row alone, over a list of what it sees, in float64."""
    rows, group, new, _ = query.shape
    length = keys.shape[1]
    out = torch.zeros_like(query, dtype=torch.float64)
    for row in range(rows):
        for step in range(new):
            seen = [i for i in range(length - new + step + 1) if visible is None or visible[row, step, i]]
            for head in range(group):
                logits = keys[row, seen].double() @ query[row, head, step].double() * scale
                out[row, head, step] = torch.softmax(logits, dim=0) @ values[row, seen].double()
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_a_float64_loop(shape: Shape) -> None:
    query, keys, values = shape.inputs()
    found = decode_rows(query, keys, values, scale=0.3)
    torch.testing.assert_close(found.double(), looped(query, keys, values, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 16, 17, 64])
def test_chunks_longer_than_a_block_are_attended_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    query, keys, values = Shape(rows=2, group=3, new=17, length=40, dim=8).inputs()
    generator = torch.Generator().manual_seed(block)
    visible = (torch.rand(2, 17, 40, generator=generator) > 0.4) | torch.eye(40, dtype=torch.bool)[-17:]
    expected = looped(query, keys, values, 0.3)
    torch.testing.assert_close(decode_rows(query, keys, values, scale=0.3).double(), expected, rtol=1e-4, atol=1e-5)
    masked = decode_rows(query, keys, values, scale=0.3, visible=visible)
    torch.testing.assert_close(masked.double(), looped(query, keys, values, 0.3, visible), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 6], ids=lambda new: f"Q{new}")
def test_visible_hides_entries_row_by_row(new: int) -> None:
    query, keys, values = Shape(rows=3, group=2, new=new, length=30, dim=8).inputs()
    oldest = torch.tensor([0, 11, 29 - new])
    visible = (torch.arange(30) >= oldest[:, None])[:, None].expand(3, new, 30)
    found = decode_rows(query, keys, values, scale=0.3, visible=visible)
    torch.testing.assert_close(found.double(), looped(query, keys, values, 0.3, visible), rtol=1e-4, atol=1e-5)


def test_visible_does_not_lift_causality() -> None:
    query, keys, values = Shape(rows=1, group=1, new=4, length=9, dim=8).inputs()
    everything = torch.ones(1, 4, 9, dtype=torch.bool)
    found = decode_rows(query, keys, values, scale=0.3, visible=everything)
    torch.testing.assert_close(found.double(), looped(query, keys, values, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 5], ids=lambda new: f"Q{new}")
def test_spare_capacity_is_never_read(new: int) -> None:
    query, keys, values = Shape(rows=2, group=3, new=new, length=33, dim=8).inputs()
    arena_k, arena_v = torch.full((2, 2, 90, 8), float("nan"))
    arena_k[:, :33], arena_v[:, :33] = keys, values
    found = decode_rows(query, arena_k[:, :33], arena_v[:, :33], scale=0.3)
    torch.testing.assert_close(found.double(), looped(query, keys, values, 0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_has_the_querys_dtype(dtype: torch.dtype) -> None:
    query, keys, values = (tensor.to(dtype) for tensor in Shape(rows=2, group=2, new=3, length=20, dim=8).inputs())
    found = decode_rows(query, keys, values, scale=0.3)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), looped(query, keys, values, 0.3), rtol=2e-2, atol=2e-2)


def test_causal_tail_by_hand() -> None:
    mask = causal_tail(2, 4, device=torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
