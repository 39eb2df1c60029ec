"""New tokens behind every row's end: the reference and the Triton kernel against lists of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.kernels.accuracy import DEVICE
from thinkkv.kernels.append import reference
from thinkkv.kernels.c_library import NoKernelError
from thinkkv.kernels.entries import entries_of, entry_bytes, multiple_of
from thinkkv.sdk.policies.policy import SMALL_DTYPES

CAPACITY = 90
"""Entries of every row."""


def implementation(name: str) -> Any:
    if name == "reference":
        return reference
    return pytest.importorskip("thinkkv.kernels.append.triton", reason="needs triton: pip install triton")


@pytest.fixture(params=["reference", "triton"])
def append(request: pytest.FixtureRequest) -> Callable[..., None]:
    function: Callable[..., None] = implementation(request.param).append
    return function


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    new: int
    dim: int
    dtype: torch.dtype = torch.float32
    counts: tuple[int, ...] | None = None
    rings: tuple[tuple[int, int], ...] | None = None
    stored: tuple[torch.dtype, torch.dtype] | None = None
    """Dtypes of the entries of keys and values; None: the states themselves."""

    def __str__(self) -> str:
        rows = "+".join(map(str, self.lengths))
        counts = "" if self.counts is None else f"-counts{'+'.join(map(str, self.counts))}"
        rings = "" if self.rings is None else "-rings" + "+".join(f"{first}.{size}" for first, size in self.rings)
        dtype = str(self.dtype).removeprefix("torch.") + ("" if self.stored is None else f"-{self.stored[1]}")
        return f"N{rows}-Q{self.new}-D{self.dim}{counts}{rings}-{dtype}"

    @property
    def nothing(self) -> list[torch.Tensor]:
        """An entry of keys and one of values that were never written."""
        if self.stored is None:
            return [torch.full((self.dim,), float("nan"), dtype=self.dtype, device=DEVICE)] * 2
        sizes = [entry_bytes(self.dim, dtype) for dtype in self.stored]
        entries = [torch.full((size,), 85, dtype=torch.uint8, device=DEVICE) for size in sizes]
        return [entry.view(dtype) for entry, dtype in zip(entries, self.stored, strict=True)]

    def new_tokens(self) -> torch.Tensor:
        """[2, R, Q, D] K and V, tokens before rows in memory."""
        generator = torch.Generator().manual_seed(self.dim + self.new)
        tokens = torch.randn(2, self.new, len(self.lengths), self.dim, generator=generator)
        return tokens.to(DEVICE, self.dtype).transpose(1, 2)

    def check(self, append: Callable[..., None]) -> None:
        rows, new = len(self.lengths), self.new_tokens()
        arenas = [nothing.repeat(rows * CAPACITY, 1) for nothing in self.nothing]
        # Rows lie in the arena in another order than their numbers.
        offsets = torch.arange(rows, device=DEVICE).flip(0) * CAPACITY
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        counts = None if self.counts is None else torch.tensor(self.counts, dtype=torch.int32, device=DEVICE)
        first, size = (None, None) if self.rings is None else torch.tensor(self.rings, dtype=torch.int32).T.to(DEVICE)
        first, size = (None, None) if first is None else (first.contiguous(), size.contiguous())
        append(*new, *arenas, offsets, lengths, counts=counts, ring_first=first, ring_size=size)
        written = self.counts or (self.new,) * rows
        assert lengths.tolist() == [old + count for old, count in zip(self.lengths, written, strict=True)]
        for arena, states, nothing in zip(arenas, new, self.nothing, strict=True):
            found = arena.unflatten(0, (rows, CAPACITY)).flip(0)
            expected = self.expected(entries_of(states, arena.dtype), nothing)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)

    def expected(self, new: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
        """[R, CAPACITY, ...]: each slot holds the newest of the tokens that may live there, if it is a new one."""
        held = nothing.repeat(len(self.lengths), CAPACITY, 1)
        for row, old in enumerate(self.lengths):
            count = self.new if self.counts is None else self.counts[row]
            first, size = (CAPACITY, 0) if self.rings is None else self.rings[row]
            for slot in range(CAPACITY):
                step = size if size and slot >= first else CAPACITY + old
                last = first + size if size else CAPACITY
                tenants = range(slot, old + count, step) if slot < last else range(0)
                if tenants and tenants[-1] >= old:
                    held[row, slot] = new[row, tenants[-1] - old + self.new - count]
        return held


CASES = [
    Case(lengths=(0,), new=1, dim=64),
    Case(lengths=(5, 0, 63), new=1, dim=80, dtype=torch.bfloat16),
    Case(lengths=(1, 20), new=2, dim=96, dtype=torch.float16),
    Case(lengths=(7, 0), new=33, dim=128),
    Case(lengths=(3, 4), new=16, dim=256, dtype=torch.float16),
    Case(lengths=(3, 4, 0, 9), new=5, dim=64, counts=(5, 0, 1, 3)),
    Case(lengths=(40, 2), new=17, dim=80, dtype=torch.bfloat16, counts=(16, 17)),
    Case(lengths=(9, 10, 11, 8), new=1, dim=64, rings=((4, 6), (4, 6), (4, 6), (0, 0))),
    Case(lengths=(1000, 3), new=5, dim=80, rings=((4, 7), (4, 1))),
    Case(lengths=(2, 0, 50), new=33, dim=64, dtype=torch.float16, rings=((4, 8), (0, 5), (0, 0))),
    Case(lengths=(6, 30, 6), new=20, dim=64, counts=(19, 0, 7), rings=((2, 16), (3, 4), (2, 3))),
]


SMALL = list(SMALL_DTYPES.values())


@pytest.mark.parametrize("case", [replace(case, stored=stored) for case in CASES for stored in (None, *SMALL)], ids=str)
def test_rows_grow_by_the_real_tokens(append: Callable[..., None], case: Case) -> None:
    case.check(append)


@settings(max_examples=15)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 1), st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=3
    ),
    new=st.integers(1, 35),
)
def test_any_rows_counts_and_rings(rows: list[tuple[int, int, int, int]], new: int) -> None:
    lengths, padded, firsts, sizes = zip(*rows, strict=True)
    counts = tuple(new // 2 if pad else new for pad in padded)
    case = Case(lengths, new, 64, counts=counts, rings=tuple(zip(firsts, sizes, strict=True)))
    for name in ("reference", "triton"):
        case.check(implementation(name).append)


def test_a_full_ring_by_hand(append: Callable[..., None]) -> None:
    # One sink and a ring of three that holds tokens 1, 2, 3; tokens 4 and 5 take the places of 1 and 2.
    arena = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None].expand(4, 64).contiguous().to(DEVICE)
    values = -arena
    new = torch.tensor([4.0, 5.0], device=DEVICE)[None, :, None].expand(1, 2, 64)
    lengths, zero = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (4, 0))
    first, size = zero + 1, zero + 3
    append(new, -new, arena, values, zero.long(), lengths, ring_first=first, ring_size=size)
    assert arena[:, 0].tolist() == [0, 4, 5, 3]
    assert values[:, 63].tolist() == [0, -4, -5, -3]
    assert lengths.tolist() == [6]


def test_rows_beyond_two_to_the_31_elements(append: Callable[..., None]) -> None:
    # 4.3 GB of addresses, of which one entry in each half is ever touched.
    arenas = torch.empty(2, 2**31 // 68 + 100, 68, dtype=torch.int8, device=DEVICE)
    new = torch.arange(128.0, device=DEVICE).view(2, 1, 1, 64)
    entry = arenas.shape[1] - 10
    offsets, lengths = torch.tensor([entry], device=DEVICE), torch.tensor([4], dtype=torch.int32, device=DEVICE)
    append(*new, *arenas, offsets, lengths)
    assert torch.equal(arenas[:, entry + 4], entries_of(new[:, 0, 0], torch.int8))


@given(
    rows=st.integers(1, 5),
    dim=st.sampled_from([8, 24, 64, 72, 80, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    stored=st.sampled_from(SMALL),
    magnitude=st.sampled_from([1e-5, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_the_kernel_in_c_rounds_as_torch_does(
    rows: int, dim: int, dtype: torch.dtype, stored: tuple[torch.dtype, torch.dtype], magnitude: float, seed: int
) -> None:
    native = pytest.importorskip("thinkkv.kernels.append.native", exc_type=NoKernelError, reason="needs a C compiler")
    assume(dim % multiple_of(stored[1]) == 0)
    generator = torch.Generator().manual_seed(seed)
    new = (torch.randn(2, rows, dim, generator=generator) * magnitude + magnitude).to(dtype)
    arenas = [torch.zeros(9 * rows, entry_bytes(dim, kind) // kind.itemsize, dtype=kind) for kind in stored]
    offsets, lengths = torch.arange(rows).flip(0) * 9, torch.arange(rows, dtype=torch.int32)
    native.append(*new, *arenas, offsets, lengths)
    for arena, states, kind in zip(arenas, new, stored, strict=True):
        expected = torch.zeros_like(arena)
        expected[offsets + lengths] = entries_of(states, kind)
        assert torch.equal(arena, expected)
