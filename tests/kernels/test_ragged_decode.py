"""Attention over rows of different length, the reference and the Triton kernels, against a masked float64 softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.closeness import assert_close
from tests.kernels.accuracy import DEVICE, RMS
from thinkkv.kernels.entries import BITS, entries_of, states_of
from thinkkv.kernels.ragged_decode import reference

GAP = 3
"""Unused entries before every row."""


def implementation(name: str) -> Any:
    if name == "reference":
        return reference
    return pytest.importorskip("thinkkv.kernels.ragged_decode.triton", reason="needs triton: pip install triton")


@pytest.fixture(params=["reference", "triton"])
def attend(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    decode: Callable[..., torch.Tensor] = implementation(request.param).ragged_decode
    return decode


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors (outputs, scratch) hold NaN: torch.empty does so among deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    group: int
    new: int
    dim: int
    dtype: torch.dtype = torch.float32
    window: int | None = None

    def __str__(self) -> str:
        rows = "+".join(map(str, self.lengths))
        window = "" if self.window is None else f"-W{self.window}"
        return f"N{rows}-G{self.group}-Q{self.new}-D{self.dim}{window}-{str(self.dtype).removeprefix('torch.')}"

    def arguments(self) -> dict[str, Any]:
        """Rows in an arena of NaN, a query that is not contiguous, windows of ``window`` entries."""
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.dim)
        ends = list(accumulate(length + GAP for length in self.lengths))
        arenas = torch.full((2, ends[-1] + GAP, self.dim), float("nan"))
        for end, length in zip(ends, self.lengths, strict=True):
            arenas[:, end - length : end] = torch.randn(2, length, self.dim, generator=generator)
        query = torch.randn(len(self.lengths), self.new, self.group, self.dim, generator=generator)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        newest = lengths[:, None] - self.new + torch.arange(self.new, dtype=torch.int32)
        return {
            "query": query.to(DEVICE, self.dtype).transpose(1, 2),
            "arena_keys": arenas[0].to(DEVICE, self.dtype),
            "arena_values": arenas[1].to(DEVICE, self.dtype),
            "offsets": (torch.tensor(ends) - lengths).to(DEVICE),
            "lengths": lengths.to(DEVICE),
            "scale": self.dim**-0.5,
            "longest": max(self.lengths),
            "starts": None if self.window is None else (newest + 1 - self.window).to(DEVICE),
        }


def exact(arguments: dict[str, Any]) -> torch.Tensor:
    """Softmax over a whole row with a mask, in float64; a query that sees nothing gets zeros."""
    query, starts = arguments["query"].double(), arguments["starts"]
    new = query.shape[2]
    out = torch.zeros_like(query)
    for row, (offset, length) in enumerate(zip(arguments["offsets"], arguments["lengths"], strict=True)):
        keys = arguments["arena_keys"][offset : offset + length].double()
        values = arguments["arena_values"][offset : offset + length].double()
        entry = torch.arange(length, device=query.device)
        newest = torch.arange(length - new, length, device=query.device)[:, None]
        hidden = entry > newest
        if starts is not None:
            hidden = hidden | (entry < starts[row][:, None])
        logits = (query[row] @ keys.T * arguments["scale"]).masked_fill(hidden, float("-inf"))
        out[row] = logits.softmax(dim=-1).nan_to_num(0.0) @ values
    return out


def check(attend: Callable[..., torch.Tensor], case: Case) -> None:
    arguments = case.arguments()
    found = attend(**arguments)
    assert found.dtype == case.dtype
    assert_close(found, exact(arguments), rms=RMS[case.dtype])


DECODE = [
    Case(lengths=(1,), group=1, new=1, dim=64),
    Case(lengths=(63, 0, 257), group=7, new=1, dim=80),
    Case(lengths=(257, 1, 2), group=3, new=1, dim=96),
    Case(lengths=(1, 63), group=16, new=1, dim=128),
    Case(lengths=(257, 5), group=1, new=1, dim=256),
]
CHUNKS = [
    Case(lengths=(2, 63, 0, 1), group=7, new=2, dim=80),
    Case(lengths=(257, 5), group=3, new=5, dim=64),
    Case(lengths=(63, 40), group=16, new=2, dim=256),
    Case(lengths=(33, 1, 100), group=3, new=33, dim=128),
    Case(lengths=(70, 33), group=1, new=33, dim=96),
]
SPLITS = [
    Case(lengths=(700, 2, 0, 257, 256), group=7, new=1, dim=64),
    Case(lengths=(3, 600), group=3, new=5, dim=80),
]
WINDOWS = [
    Case(lengths=(257, 0, 3, 64), group=7, new=1, dim=64, window=32),
    Case(lengths=(1, 100), group=3, new=5, dim=80, window=1),
    Case(lengths=(700, 260), group=2, new=2, dim=128, window=300),
    Case(lengths=(600, 20), group=4, new=33, dim=64, window=7),
    Case(lengths=(10, 900), group=1, new=2, dim=96, window=50),
]
FORMS = [*DECODE, *CHUNKS, *SPLITS, *WINDOWS]
HALVES = [replace(case, dtype=dtype) for case in FORMS for dtype in (torch.float16, torch.bfloat16)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [*FORMS, *HALVES], ids=str)
def test_attention_equals_a_masked_float64_softmax(attend: Callable[..., torch.Tensor], case: Case) -> None:
    check(attend, case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("values", list(BITS), ids=str)
@pytest.mark.parametrize("dtype", RMS, ids=str)
@pytest.mark.parametrize("case", [*DECODE, *CHUNKS, *SPLITS, *WINDOWS], ids=str)
def test_small_entries_are_attended_as_what_they_stand_for(
    attend: Callable[..., torch.Tensor], case: Case, dtype: torch.dtype, values: torch.dtype
) -> None:
    arguments = replace(case, dtype=dtype).arguments()
    stored = {"arena_keys": torch.int8, "arena_values": values}
    small = {name: entries_of(arguments[name], dtype) for name, dtype in stored.items()}
    exactly = {name: states_of(entries, torch.float32) for name, entries in small.items()}
    assert_close(attend(**arguments | small), exact(arguments | exactly), rms=2 * RMS[dtype])


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any),
    group=st.integers(1, 16),
    new=st.integers(1, 7),
    dim=st.sampled_from([64, 80]),
    window=st.none() | st.integers(1, 40),
)
def test_any_lengths_groups_and_windows(lengths: list[int], group: int, new: int, dim: int, window: int | None) -> None:
    case = Case(tuple(lengths), group, new, dim, window=window)
    for name in ("reference", "triton"):
        check(implementation(name).ragged_decode, case)


@pytest.mark.usefixtures("poisoned_memory")
def test_queries_that_see_nothing_get_zeros(attend: Callable[..., torch.Tensor]) -> None:
    arguments = Case(lengths=(0, 2, 300), group=3, new=4, dim=64).arguments()
    out = attend(**arguments)
    assert out[0].count_nonzero() == 0
    assert out[1, :, :2].count_nonzero() == 0
    assert out[1, :, 2:].ne(0).all()
    behind = attend(**arguments | {"starts": torch.full((3, 4), 300, dtype=torch.int32, device=DEVICE)})
    assert behind.count_nonzero() == 0


@pytest.mark.usefixtures("poisoned_memory")
def test_a_static_capacity_changes_nothing(attend: Callable[..., torch.Tensor]) -> None:
    arguments = Case(lengths=(300, 1, 0), group=2, new=2, dim=64).arguments()
    assert_close(attend(**arguments | {"longest": 4096}), attend(**arguments), rms=1e-6)


def test_later_splits_may_outweigh_many_earlier_ones(attend: Callable[..., torch.Tensor]) -> None:
    arguments = Case(lengths=(4400, 5), group=2, new=1, dim=64).arguments()
    arguments["arena_keys"][4200:] *= 5
    assert_close(attend(**arguments), exact(arguments), rms=RMS[torch.float32])


def test_a_chunk_equals_its_tokens_one_after_another(attend: Callable[..., torch.Tensor]) -> None:
    arguments = Case(lengths=(70, 9), group=3, new=4, dim=64).arguments()
    chunk = attend(**arguments)
    for token in range(4):
        query = arguments["query"][:, :, token : token + 1]
        step = attend(**arguments | {"query": query, "lengths": arguments["lengths"] - (3 - token)})
        assert_close(chunk[:, :, token : token + 1], step, rms=1e-6)


def test_padding_before_a_rows_real_tokens_changes_nothing(attend: Callable[..., torch.Tensor]) -> None:
    arguments = Case(lengths=(50, 40), group=3, new=5, dim=64).arguments()
    padded = attend(**arguments)
    real = attend(**arguments | {"query": arguments["query"][:, :, 3:]})
    assert_close(padded[:, :, 3:], real, rms=1e-6)


def test_logits_of_any_size_stay_finite(attend: Callable[..., torch.Tensor]) -> None:
    arguments = Case(lengths=(300, 7), group=2, new=2, dim=64).arguments() | {"scale": 40.0}
    assert_close(attend(**arguments), exact(arguments), rms=1e-4)


def test_rows_beyond_two_to_the_31_elements(attend: Callable[..., torch.Tensor]) -> None:
    # 4.3 GB of addresses, of which only the row's are ever touched; keys and values share them.
    case = Case(lengths=(20,), group=2, new=1, dim=64, dtype=torch.float16)
    arguments = case.arguments()
    arena = torch.empty(2**31 // 64 + 100, 64, dtype=torch.float16, device=DEVICE)
    entry = len(arena) - 50
    arena[entry : entry + 20] = arguments["arena_keys"][GAP : GAP + 20]
    arguments |= {"arena_keys": arena, "arena_values": arena, "offsets": torch.tensor([entry], device=DEVICE)}
    assert_close(attend(**arguments), exact(arguments), rms=5e-3)


@pytest.mark.parametrize("longest", [0, 1, 255, 300, 8192, 131072])
def test_split_lengths_are_whole_tiles(longest: int) -> None:
    kernels = implementation("triton")
    tiles = [tile for tiles in kernels.TILES.values() for tile in tiles.values()]
    for rows, blocks in product((1, 8, 300), (1, 5, 64)):
        split = kernels.split_length(longest, rows, blocks)
        assert math.log2(split).is_integer()
        assert all(split % tile.block_n == 0 for tile in tiles)


def test_one_long_row_is_spread_over_many_programs() -> None:
    kernels = implementation("triton")
    assert 32768 // kernels.split_length(32768, rows=64, blocks=1) >= 32
