"""Kept tokens gathered into the arena: the reference and the Triton kernel against loops over single tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.accuracy import DEVICE
from thinkkv.kernels.compact import reference

GAP = 2
"""Unused entries before every row."""


def implementation(name: str) -> Any:
    if name == "reference":
        return reference
    return pytest.importorskip("thinkkv.kernels.compact.triton", reason="needs triton: pip install triton")


@pytest.fixture(params=["reference", "triton"])
def compact(request: pytest.FixtureRequest) -> Callable[..., None]:
    function: Callable[..., None] = implementation(request.param).compact
    return function


@dataclass(frozen=True)
class Case:
    tokens: int
    kept: tuple[int, ...]
    dim: int
    dtype: torch.dtype = torch.float32
    bounded: bool = False

    def __str__(self) -> str:
        rows = "+".join(map(str, self.kept))
        return f"N{self.tokens}-kept{rows}-D{self.dim}{'-longest' * self.bounded}-{str(self.dtype)[6:]}"

    def check(self, compact: Callable[..., None]) -> None:
        rows = len(self.kept)
        generator = torch.Generator().manual_seed(self.tokens + self.dim)
        # Tokens before rows in memory, as projections give them.
        prompt = torch.randn(2, self.tokens, rows, self.dim, generator=generator).to(DEVICE, self.dtype)
        prompt = prompt.transpose(1, 2)
        positions = [torch.randperm(self.tokens, generator=generator)[:count].sort().values for count in self.kept]
        starts = torch.tensor([0, *accumulate(self.kept)], device=DEVICE)
        offsets = starts[:-1] + GAP * torch.arange(1, rows + 1, device=DEVICE)
        size = sum(self.kept) + GAP * (rows + 1)
        arenas = torch.full((2, size, self.dim), float("nan"), dtype=self.dtype, device=DEVICE)
        expected = arenas.clone()
        for row, chosen in enumerate(positions):
            for entry, position in enumerate(chosen.tolist()):
                expected[:, offsets[row] + entry] = prompt[:, row, position]
        longest = max(self.kept) if self.bounded else None
        compact(*prompt, torch.cat(positions).to(DEVICE), starts, *arenas, offsets, longest=longest)
        torch.testing.assert_close(arenas, expected, rtol=0, atol=0, equal_nan=True)


CASES = [
    Case(tokens=1, kept=(1,), dim=64),
    Case(tokens=63, kept=(0, 63, 1), dim=80, dtype=torch.bfloat16),
    Case(tokens=257, kept=(257, 3, 64, 65), dim=96, dtype=torch.float16),
    Case(tokens=257, kept=(20, 19), dim=128, bounded=True),
    Case(tokens=40, kept=(17, 0, 16), dim=256, dtype=torch.float16, bounded=True),
    Case(tokens=9, kept=(0, 0), dim=64, bounded=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_hold_their_kept_tokens_in_order(compact: Callable[..., None], case: Case) -> None:
    case.check(compact)


@settings(max_examples=15)
@given(kept=st.lists(st.integers(0, 70), min_size=1, max_size=4), dim=st.sampled_from([64, 80]), bounded=st.booleans())
def test_any_numbers_of_kept_tokens(kept: list[int], dim: int, bounded: bool) -> None:
    case = Case(70, tuple(kept), dim, bounded=bounded)
    for name in ("reference", "triton"):
        case.check(implementation(name).compact)


def test_prompts_and_rows_beyond_two_to_the_31_elements(compact: Callable[..., None]) -> None:
    # Row 2 of the prompt begins 2**31 elements behind row 0; only the entries named here are ever touched.
    prompt = torch.empty(2**31 + 128, dtype=torch.int8, device=DEVICE).as_strided((3, 2, 64), (2**30, 64, 1))
    arenas = torch.empty(2, 2**31 // 64 + 100, 64, dtype=torch.int8, device=DEVICE)
    prompt[2] = torch.arange(128, dtype=torch.int8).view(2, 64)
    entry = arenas.shape[1] - 10
    offsets = torch.tensor([0, 10, entry], device=DEVICE)
    starts = torch.tensor([0, 0, 0, 1], device=DEVICE)
    compact(prompt, prompt, torch.tensor([1], device=DEVICE), starts, *arenas, offsets)
    assert torch.equal(arenas[:, entry], prompt[2, 1].expand(2, 64))
