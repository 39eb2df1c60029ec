"""The operations on a layer's rows, by every backend, against float64 loops over plain lists of rows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.kernels.accuracy import RMS
from tests.kernels.sylvester import sylvester
from thinkkv.kernels import grouped
from thinkkv.kernels.arena import Arena
from thinkkv.kernels.dispatch import RowOperations, row_operations
from thinkkv.kernels.entries import entry_bytes, states_of
from thinkkv.sdk.policies.policy import SMALL_DTYPES

BACKENDS = ["torch", "native", "reference", "triton"]


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    group: int
    new: int
    dim: int

    def __str__(self) -> str:
        return f"T{'.'.join(map(str, self.lengths))}-G{self.group}-Q{self.new}-D{self.dim}"


SHAPES = [
    Shape(lengths=(1,), group=1, new=1, dim=80),
    Shape(lengths=(63, 63, 63), group=7, new=1, dim=80),
    Shape(lengths=(257, 2, 63, 2), group=3, new=1, dim=64),
    Shape(lengths=(5, 5), group=3, new=5, dim=64),
    Shape(lengths=(17, 130, 17, 40), group=2, new=17, dim=64),
    Shape(lengths=(3, 9), group=4, new=6, dim=64),  # the first row has received fewer tokens than the chunk is wide
]


@pytest.fixture(params=BACKENDS)
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowOperations:
    monkeypatch.setenv("THINKKV_KERNELS", request.param)
    return row_operations("cpu")


SMALL = list(SMALL_DTYPES.values())
"""Dtypes of small entries of keys and values."""


def arena_of(lengths: tuple[int, ...], dim: int, kinds: tuple[torch.dtype, torch.dtype], spare: int = 20) -> Arena:
    """An arena full of NaN, or of huge numbers, for rows of these lengths."""
    alike = {length: [i for i, other in enumerate(lengths) if other == length] for length in sorted(set(lengths))}
    blocks = [(alike[length], length) for length in sorted(alike, reverse=True)]
    keys, values = (torch.empty(0, entry_bytes(dim, dtype) // dtype.itemsize, dtype=dtype) for dtype in kinds)
    arena = Arena(blocks, spare=spare, like=(keys, values))
    for entries in (arena.keys, arena.values):
        entries.fill_({torch.int8: 127, torch.int16: -1, torch.uint8: 255}.get(entries.dtype, float("nan")))
    return arena


def stored(arena: Arena) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values in use, by row index."""
    found = {
        index: tuple(states_of(entries[place, : block.length], torch.float32) for entries in (block.keys, block.values))
        for block in arena.blocks
        for place, index in enumerate(block.index)
    }
    return [found[index] for index in range(len(found))]


def attended(
    arena: Arena, query: torch.Tensor, scale: float, starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query of every row alone, over a list of what it sees, in float64; and which queries see something."""
    out = torch.zeros_like(query, dtype=torch.float64)
    sees = torch.zeros(query.shape[:3], dtype=torch.bool)
    new = query.shape[2]
    for row, (keys, values) in enumerate(stored(arena)):
        for step in range(new):
            first = 0 if starts is None else int(starts[row, step])
            seen = list(range(first, len(keys) - new + step + 1))
            if not seen:
                continue
            sees[row, :, step] = True
            for head in range(query.shape[1]):
                logits = keys[seen].double() @ query[row, head, step].double() * scale
                out[row, head, step] = torch.softmax(logits, dim=0) @ values[seen].double()
    return out, sees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("windowed", [False, True], ids=["causal", "window"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_filled_extended_and_attended(
    shape: Shape, windowed: bool, dtype: torch.dtype, operations: RowOperations
) -> None:
    generator = torch.Generator().manual_seed(sum(shape.lengths))
    rows, prompt = len(shape.lengths), max(shape.lengths)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    keys, values = drawn(rows, prompt, shape.dim), drawn(rows, prompt, shape.dim)
    held = tuple(max(0, length - shape.new) for length in shape.lengths)
    kept = [torch.randperm(prompt, generator=generator)[:count].sort().values for count in held]
    arena = arena_of(held, shape.dim, (dtype, dtype))
    operations.compact(arena, keys, values, kept)
    for row, (found_keys, found_values) in enumerate(stored(arena)):
        assert torch.equal(found_keys, keys[row, kept[row]])
        assert torch.equal(found_values, values[row, kept[row]])

    # As projected, the new tokens of all heads lie side by side.
    new_keys, new_values = (drawn(shape.new, rows, shape.dim).transpose(0, 1) for _ in "kv")
    operations.append(arena, new_keys, new_values)
    arena.lengthen(shape.new, counted=operations.counting)
    assert arena.lengths.tolist() == [count + shape.new for count in held]
    for row, (found_keys, found_values) in enumerate(stored(arena)):
        assert torch.equal(found_keys[held[row] :], new_keys[row])
        assert torch.equal(found_values[held[row] :], new_values[row])

    query = drawn(rows, shape.group, shape.new, shape.dim)
    starts = None
    if windowed:
        starts = torch.randint(0, 40, (rows, shape.new), generator=generator, dtype=torch.int32)
    expected, sees = attended(arena, query, 0.3, starts)
    found = operations.ragged_decode(arena, query, scale=0.3, starts=starts)
    assert found.dtype == dtype
    error = (found.double() - expected)[sees].norm() / expected[sees].norm().clamp(min=1e-30)
    assert error < RMS[dtype]
    assert not found[~sees].any()


@pytest.mark.parametrize("kinds", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_entries_are_filled_extended_and_attended(
    shape: Shape, dtype: torch.dtype, kinds: tuple[torch.dtype, torch.dtype], operations: RowOperations
) -> None:
    generator = torch.Generator().manual_seed(sum(shape.lengths))
    rows, prompt = len(shape.lengths), max(shape.lengths)
    states = torch.randn(2, rows, prompt, shape.dim, generator=generator).to(dtype)
    new = torch.randn(2, shape.new, rows, shape.dim, generator=generator).to(dtype).transpose(1, 2)
    held = tuple(max(0, length - shape.new) for length in shape.lengths)
    kept = [torch.randperm(prompt, generator=generator)[:count].sort().values for count in held]
    arena = arena_of(held, shape.dim, kinds)
    operations.compact(arena, *states, kept)
    operations.append(arena, *new)
    arena.lengthen(shape.new, counted=operations.counting)
    for row, found in enumerate(stored(arena)):
        for kind in range(2):
            exact = torch.cat([states[kind, row, kept[row]], new[kind, row]]).double()
            error, half_a_step = found[kind] - exact, exact.abs().amax(dim=-1, keepdim=True) / 254
            if kinds[kind] != torch.int8:
                steps = {torch.uint8: 15, torch.int16: 31}[kinds[kind]]
                exact, error = exact @ sylvester(shape.dim), error @ sylvester(shape.dim)
                least, most = exact.aminmax(dim=-1, keepdim=True)
                half_a_step = (most - least) / steps / 2 + (most - 2 * least) * 2**-11
            assert (error.abs() <= half_a_step * 1.001).all()
    query = torch.randn(rows, shape.group, shape.new, shape.dim, generator=generator).to(dtype)
    expected, sees = attended(arena, query, 0.3, None)
    found = operations.ragged_decode(arena, query, scale=0.3)
    error = (found.double() - expected)[sees].norm() / expected[sees].norm().clamp(min=1e-30)
    assert error < 2 * RMS[dtype]  # what an entry stands for is rounded to the dtype once more
    assert not found[~sees].any()


@pytest.mark.parametrize("kinds", SMALL, ids=str)
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden_in_a_small_entry(
    odd: float, kinds: tuple[torch.dtype, torch.dtype], operations: RowOperations
) -> None:
    arena = arena_of((2, 2), 64, kinds)
    operations.compact(arena, *torch.ones(2, 2, 2, 64), [torch.arange(2)] * 2)
    new = torch.ones(2, 2, 1, 64)
    new[:, 1, 0, 7] = odd
    operations.append(arena, *new)
    arena.lengthen(1, counted=operations.counting)
    for sound, unsound in zip(*stored(arena), strict=True):
        assert sound.isfinite().all()
        assert not unsound[2].isfinite().all()


def test_rows_of_length_zero_give_zeros(operations: RowOperations) -> None:
    arena = arena_of((0, 3, 0), 64, (torch.float32, torch.float32))
    operations.compact(arena, torch.randn(3, 4, 64), torch.randn(3, 4, 64), [torch.arange(n) for n in (0, 3, 0)])
    query = torch.randn(3, 2, 1, 64)
    found = operations.ragged_decode(arena, query, scale=0.3)
    expected, _ = attended(arena, query, 0.3, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 16, 17, 64])
def test_chunks_longer_than_a_query_block_are_attended_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "QUERY_BLOCK", block)
    arena = arena_of((40, 40, 21), 64, (torch.float32, torch.float32))
    prompt = torch.randn(2, 3, 40, 64)
    grouped.compact(arena, *prompt, [torch.arange(n) for n in (40, 40, 21)])
    query = torch.randn(3, 3, 17, 64)
    starts = torch.randint(0, 10, (3, 17), dtype=torch.int32)
    for first in (None, starts):
        expected, _ = attended(arena, query, 0.3, first)
        found = grouped.ragged_decode(arena, query, scale=0.3, starts=first)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("length", [63, 64, 101])
def test_rows_split_over_threads_are_attended_whole(length: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "SHORTEST_PART", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    arena = arena_of((length, 9, length, length, length), 64, (torch.float32, torch.float32))
    prompt = torch.randn(2, 5, length, 64)
    grouped.compact(arena, *prompt, [torch.arange(n) for n in (length, 9, length, length, length)])
    query = torch.randn(5, 3, 1, 64)
    expected, _ = attended(arena, query, 0.3, None)
    found = grouped.ragged_decode(arena, query, scale=0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
