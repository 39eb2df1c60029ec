"""The kernel in C against float64, on odd shapes amid NaN, and what happens where it cannot be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.kernels.accuracy import RMS
from thinkkv.kernels import c_library, native
from thinkkv.kernels.arena import Arena
from thinkkv.kernels.c_library import NoKernelError
from thinkkv.kernels.entries import BITS, entries_of, multiple_of, states_of
from thinkkv.kernels.ragged_decode import native as kernel


def attended(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[R, G, 1, D] in float64, row by row."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for row, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
        first = 0 if starts is None else max(0, int(starts[row, 0]))
        if first < length:
            seen = slice(offset + first, offset + length)
            weights = torch.softmax(query[row, :, 0].double() @ keys[seen].double().T * scale, dim=-1)
            out[row, :, 0] = weights @ values[seen].double()
    return out


def random_rows(lengths: list[int], dim: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """Keys, values, offsets and lengths of rows with gaps of NaN between them, laid down in reverse."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths) + 7 * (len(lengths) + 1)
    keys, values = (torch.full((size, dim), float("nan"), dtype=dtype) for _ in "kv")
    offsets, place = [0] * len(lengths), 7
    for row in reversed(range(len(lengths))):
        for states in (keys, values):
            states[place : place + lengths[row]] = torch.randn(lengths[row], dim, generator=generator).to(dtype)
        offsets[row] = place
        place += lengths[row] + 7
    return keys, values, torch.tensor(offsets), torch.tensor(lengths, dtype=torch.int32)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 63, 64, 127, 128, 129, 255, 257, 700, 1100]), min_size=1, max_size=5),
    group=st.integers(1, 16),
    dim=st.sampled_from([8, 64, 72, 80, 96, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    threads=st.integers(1, 3),
    windowed=st.booleans(),
    small=st.sampled_from([None, *BITS]),
    seed=st.integers(0, 1000),
)
def test_equals_float64(
    lengths: list[int],
    group: int,
    dim: int,
    dtype: torch.dtype,
    threads: int,
    windowed: bool,
    small: torch.dtype | None,
    seed: int,
) -> None:
    assume(small is None or dim % multiple_of(small) == 0)
    keys, values, *places = random_rows(lengths, dim, dtype, seed)
    rows = exact = keys, values, *places
    if small is not None:  # the dtype of the values' entries
        rows = entries_of(keys, torch.int8), entries_of(values, small), *places
        exact = *(states_of(entries, torch.float32) for entries in rows[:2]), *places
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(len(lengths), group, 1, dim, generator=generator).to(dtype)
    starts = torch.randint(-5, 300, (len(lengths), 1), generator=generator, dtype=torch.int32) if windowed else None
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = kernel.ragged_decode(query, *rows, starts, 0.3)
    finally:
        torch.set_num_threads(usual)
    expected = attended(query, *exact, starts, 0.3)
    assert found.dtype == dtype
    assert (found.double() - expected).norm() <= RMS[dtype] * expected.norm()


@pytest.mark.parametrize("largest", [1.0, 50.0, 3000.0])
def test_sharp_scores_neither_overflow_nor_vanish(largest: float) -> None:
    rows = random_rows([300, 5], 64, torch.float32, 3)
    query = torch.randn(2, 3, 1, 64) * largest
    found, expected = kernel.ragged_decode(query, *rows, None, 1.0), attended(query, *rows, None, 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


def test_nan_in_a_query_is_not_hidden_and_stays_in_its_head() -> None:
    rows = random_rows([200, 100], 64, torch.float32, 4)
    query = torch.randn(2, 3, 1, 64)
    query[0, 1] = float("nan")
    found = kernel.ragged_decode(query, *rows, None, 0.1)
    assert found.isnan().all(dim=-1)[..., 0].tolist() == [[False, True, False], [False, False, False]]


def test_a_query_of_any_strides_is_read_rightly() -> None:
    rows = random_rows([50, 20], 64, torch.float32, 5)
    query = torch.randn(64, 2, 1, 3).permute(1, 3, 2, 0)
    found = kernel.ragged_decode(query, *rows, None, 0.1)
    assert torch.equal(found, kernel.ragged_decode(query.contiguous(), *rows, None, 0.1))


def test_the_operator_is_the_function_and_known_to_compilers() -> None:
    rows = random_rows([50, 20], 64, torch.float32, 6)
    query = torch.randn(2, 3, 1, 64)
    assert torch.equal(kernel.operator(query, *rows, None, 0.1), kernel.ragged_decode(query, *rows, None, 0.1))
    torch.library.opcheck(kernel.operator, (query, *rows, None, 0.1), test_utils=("test_schema", "test_faketensor"))


UNFIT = {
    "chunk": ((2, 3, 2, 64), torch.float32),
    "group": ((2, 17, 1, 64), torch.float32),
    "odd-dim": ((2, 3, 1, 12), torch.float32),
    "large-dim": ((2, 3, 1, 264), torch.float32),
    "float64": ((2, 3, 1, 64), torch.float64),
}


@pytest.mark.parametrize(("shape", "dtype"), UNFIT.values(), ids=UNFIT)
def test_what_it_is_not_made_for_goes_to_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query = torch.randn(shape, dtype=dtype)
    assert not kernel.takes(query)
    arena = Arena([([0, 1], 9)], spare=4, like=(query, query))
    arena.keys.normal_()
    arena.values.normal_()
    rows = arena.keys, arena.values, arena.offsets, arena.lengths
    last = attended(query[:, :, -1:], *rows, None, 0.3)
    found = native.ragged_decode(arena, query, scale=0.3)[:, :, -1:]
    torch.testing.assert_close(found.double(), last, rtol=1e-3, atol=1e-5)


def test_gradients_reach_the_query() -> None:
    arena = Arena([([0, 1], 9)], spare=4, like=(torch.empty(0, 64),) * 2)
    arena.keys.normal_()
    arena.values.normal_()
    query = torch.randn(2, 3, 1, 64, requires_grad=True)
    native.ragged_decode(arena, query, scale=0.3).sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0


SOURCE = "int answer(void) { return %d; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source file, and an empty cache folder for what is made of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "native.c").write_text(SOURCE % 1)
    return folder / "native.c"


def test_a_library_is_compiled_once_and_anew_when_its_source_or_a_header_changes(source: Path) -> None:
    assert c_library.load(source).answer() == 1
    made = list((source.parents[1] / "cache").rglob("*.so"))
    time = made[0].stat().st_mtime_ns
    assert c_library.load(source).answer() == 1
    assert made[0].stat().st_mtime_ns == time
    source.write_text(SOURCE % 2)
    assert c_library.load(source).answer() == 2
    (source.parents[1] / "more.h").write_text("#define MORE 1\n")
    c_library.load(source)
    made = [path.name for path in (source.parents[1] / "cache").rglob("*.so")]
    assert len(made) == 3
    kept = [path.name for path in (source.parents[1] / "cache").rglob("*") if path.is_file()]
    assert sorted(kept) == sorted(path.name for path in (source.parents[1] / "cache").rglob("*.so"))


@pytest.mark.parametrize(
    ("code", "compiler", "message"),
    [
        ("int answer(void) {", None, "failed: .*error"),
        ("int missing(void);\nint answer(void) { return missing(); }", None, "undefined symbol: missing"),
        (SOURCE % 1, "no-such-compiler", "no-such-compiler cannot be run"),
    ],
    ids=["does-not-compile", "does-not-load", "no-compiler"],
)
def test_a_library_that_cannot_be_made_says_why(
    code: str, compiler: str | None, message: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text(code)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    with pytest.raises(NoKernelError, match=message):
        c_library.load(source)


def test_a_cache_folder_that_cannot_be_written_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = source.parent / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(NoKernelError, match="cannot be kept"):
        c_library.load(source)


def test_processes_that_compile_at_once_all_get_a_whole_library(source: Path) -> None:
    script = (
        "from pathlib import Path; from thinkkv.kernels.c_library import load; "
        f"print(load(Path({str(source)!r})).answer())"
    )
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == ["1"] * 3
