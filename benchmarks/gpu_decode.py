"""Triton operations on a GPU: correctness, then measured time beside the bandwidth model's estimate.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json
    python benchmarks/gpu_decode.py --dry        # without a GPU: interpreted, tiny shapes, correctness only

Meant to take about five minutes. This project has had no GPU: the measuring part is written and has never run; only
``--dry`` has. A time is the median of single calls with a cold L2, from events around the call, and so includes gaps
between an operation's launches.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from environment import save
from rich.console import Console
from rich.table import Table

from thinkkv.kernels import bandwidth
from thinkkv.kernels.bandwidth import MODELS, REACHED, Model, Traffic
from thinkkv.kernels.chips import A100, H100, MI300X
from thinkkv.kernels.compile_report import operations

ALLOWED = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
"""Largest relative RMS error against plain torch."""

PUBLISHED = {
    "A100-SXM4-80GB": A100.bandwidth,
    "H100 80GB HBM3": H100.bandwidth,
    "MI300X": MI300X.bandwidth,
}
"""Part of a device's name: published peak bandwidth, bytes per second."""

TINY = Model("tiny", layers=1, kv_heads=2, group=3, dim=64)
REPETITIONS = 30
WINDOW, TOP = 32, 256


@dataclass(frozen=True)
class Case:
    """One call to check and to time.

    Args:
        operation, label: what is called, on what.
        run: the call that is timed.
        expected: what should come out, by plain torch in float32.
        traffic: the model's bytes.
        found: what came out, from what the call returned.
        reset: undoes what a call changes.
    """

    operation: str
    label: str
    run: Callable[[], Any]
    expected: Callable[[], torch.Tensor]
    traffic: Traffic
    found: Callable[[Any], torch.Tensor] = lambda returned: returned
    reset: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Setup:
    """What every case of a run shares."""

    model: Model
    context: int
    dtype: torch.dtype
    device: torch.device

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    @property
    def label(self) -> str:
        return f"{self.model.name} N{self.context}"

    @property
    def scale(self) -> float:
        return self.model.dim**-0.5

    def row_lengths(self) -> dict[str, list[int]]:
        """Rows of one length, and one long row among short ones."""
        rows = self.model.kv_heads
        return {"even": [self.context] * rows, "ragged": [self.context] + [max(1, self.context // 8)] * (rows - 1)}


@dataclass(frozen=True)
class Arena:
    """Rows with room for one more token each, one behind the other; what no row holds is NaN."""

    keys: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, setup: Setup, lengths: Sequence[int]) -> Arena:
        counts = torch.tensor(lengths, device=setup.device)
        offsets = (counts + 1).cumsum(0) - (counts + 1)
        storage = torch.full((2, sum(lengths) + len(lengths), setup.model.dim), float("nan"), device=setup.device)
        arena = cls(*storage.to(setup.dtype), offsets, counts.int())
        for row in (*arena.rows(arena.keys), *arena.rows(arena.values)):
            row.copy_(setup.random(*row.shape))
        return arena

    def rows(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each row holds of keys or values, [length, D]."""
        spans = zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)
        return [tensor[offset : offset + length] for offset, length in spans]

    def held(self) -> torch.Tensor:
        """Keys and values of all rows, [2, tokens, D]."""
        return torch.stack([torch.cat(self.rows(tensor)) for tensor in (self.keys, self.values)])


def function(operation: str, name: str) -> Callable[..., Any]:
    """A host function; imported late, because triton looks at TRITON_INTERPRET when it is imported."""
    return getattr(importlib.import_module(f"thinkkv.kernels.{operation}.triton"), name)


def window_scores_cases(setup: Setup) -> Iterator[Case]:
    from thinkkv.kernels.window_scores import reference

    model = setup.model
    queries = setup.random(model.kv_heads * model.group, min(WINDOW, setup.context), model.dim)
    keys = setup.random(model.kv_heads, setup.context, model.dim)
    compute = function("window_scores", "window_scores")
    yield Case(
        "window_scores",
        setup.label,
        run=lambda: compute(queries, keys, scale=setup.scale),
        expected=lambda: reference.window_scores(queries, keys, scale=setup.scale),
        traffic=bandwidth.window_scores(
            kv_heads=model.kv_heads,
            group=model.group,
            tokens=setup.context,
            dim=model.dim,
            itemsize=setup.dtype.itemsize,
            window=queries.shape[1],
        ),
    )


def semantic_vector_cases(setup: Setup) -> Iterator[Case]:
    from thinkkv.kernels.semantic_vector import reference

    model = setup.model
    heads = model.kv_heads * model.group
    weights = torch.randn(heads, setup.context, device=setup.device).softmax(dim=1)
    values = setup.random(model.kv_heads, setup.context, model.dim)
    compute = function("semantic_vector", "semantic_vector")
    yield Case(
        "semantic_vector",
        f"{setup.label} t{TOP}",
        run=lambda: compute(weights, values, top=TOP),
        expected=lambda: reference.semantic_vector(weights, values, top=TOP),
        traffic=bandwidth.semantic_vector(
            heads=heads, tokens=setup.context, dim=model.dim, itemsize=setup.dtype.itemsize, top=TOP
        ),
    )


def compact_cases(setup: Setup) -> Iterator[Case]:
    compute = function("compact", "compact")
    dim = setup.model.dim
    keys, values = (setup.random(setup.model.kv_heads, setup.context, dim) for _ in range(2))
    for name, lengths in setup.row_lengths().items():
        arena = Arena.of(setup, lengths)
        chosen = [torch.randperm(setup.context, device=setup.device)[:length].sort().values for length in lengths]
        starts = torch.tensor([0, *lengths], device=setup.device).cumsum(0)
        arguments = (keys, values, torch.cat(chosen), starts, arena.keys, arena.values, arena.offsets)
        gathered = [torch.cat([rows[head, kept] for head, kept in enumerate(chosen)]) for rows in (keys, values)]
        yield Case(
            "compact",
            f"{setup.label} {name}",
            run=partial(compute, *arguments, longest=max(lengths)),
            expected=partial(torch.stack, gathered),
            traffic=bandwidth.compact(kept=lengths, dim=dim, itemsize=setup.dtype.itemsize),
            found=lambda _, arena=arena: arena.held(),
        )


def append_cases(setup: Setup) -> Iterator[Case]:
    compute = function("append", "append")
    rows, dim = setup.model.kv_heads, setup.model.dim
    for name, lengths in setup.row_lengths().items():
        arena = Arena.of(setup, lengths)
        before = arena.lengths.clone()
        new = [setup.random(rows, 1, dim) for _ in range(2)]
        grown = [
            torch.cat([torch.cat(pair) for pair in zip(arena.rows(tensor), added, strict=True)])
            for tensor, added in zip((arena.keys, arena.values), new, strict=True)
        ]
        yield Case(
            "append",
            f"{setup.label} {name}",
            run=partial(compute, *new, arena.keys, arena.values, arena.offsets, arena.lengths),
            expected=partial(torch.stack, grown),
            traffic=bandwidth.append(rows=rows, dim=dim, itemsize=setup.dtype.itemsize),
            found=lambda _, arena=arena: arena.held(),
            reset=partial(arena.lengths.copy_, before),
        )


def ragged_decode_cases(setup: Setup) -> Iterator[Case]:
    compute = function("ragged_decode", "ragged_decode")
    model = setup.model
    for name, lengths in setup.row_lengths().items():
        arena = Arena.of(setup, lengths)
        query = setup.random(model.kv_heads, model.group, 1, model.dim)
        arguments = (query, arena.keys, arena.values, arena.offsets, arena.lengths)
        yield Case(
            "ragged_decode",
            f"{setup.label} {name}",
            run=partial(compute, *arguments, scale=setup.scale, longest=max(lengths)),
            expected=partial(attended, query, arena, setup.scale),
            traffic=bandwidth.ragged_decode(
                lengths=lengths, group=model.group, dim=model.dim, itemsize=setup.dtype.itemsize
            ),
        )


def attended(query: torch.Tensor, arena: Arena, scale: float) -> torch.Tensor:
    """[R, G, 1, D] float32: every row alone."""
    rows = zip(query.float(), arena.rows(arena.keys), arena.rows(arena.values), strict=True)
    return torch.stack([torch.softmax(q @ k.float().T * scale, dim=-1) @ v.float() for q, k, v in rows])


CASES = {
    "window_scores": window_scores_cases,
    "semantic_vector": semantic_vector_cases,
    "compact": compact_cases,
    "append": append_cases,
    "ragged_decode": ragged_decode_cases,
}


def cases(setups: Sequence[Setup]) -> Iterator[Case]:
    """Cases of the operations that have a Triton kernel; tensors live for one case each."""
    for operation in operations():
        for setup in setups:
            yield from CASES[operation](setup)


def check(case: Case, dtype: torch.dtype) -> float:
    """Relative RMS error of one call; raises where it is too large or NaN."""
    found = case.found(case.run()).double()
    expected = case.expected().double()
    case.reset()
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= ALLOWED[dtype]:
        raise SystemExit(f"{case.operation} {case.label}: relative error {error:.1e}, allowed {ALLOWED[dtype]:.0e}")
    return error


def measured_seconds(case: Case, flush: torch.Tensor) -> float:
    """Median time of a call with a cold L2."""
    times = []
    for _ in range(REPETITIONS):
        case.reset()
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        case.run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    case.reset()
    return statistics.median(times)


def copied_bandwidth(flush: torch.Tensor) -> float:
    """Bytes per second, read and written, of a plain copy."""
    source = torch.empty(2**28, dtype=torch.int32, device=flush.device)
    target = torch.empty_like(source)
    copy = Case("copy", "", partial(target.copy_, source), lambda: source, Traffic(source.nbytes, source.nbytes, 1))
    return copy.traffic.moved / measured_seconds(copy, flush)


def measure(setups: Sequence[Setup], dtype: torch.dtype) -> dict[str, Any]:
    """All cases, checked and timed, and what they are compared with."""
    device = torch.cuda.get_device_name()
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    copied = copied_bandwidth(flush)
    peak = next((value for name, value in PUBLISHED.items() if name in device), copied)
    rows = []
    for case in cases(setups):
        error = check(case, dtype)
        seconds = measured_seconds(case, flush)
        rows.append(
            {
                "operation": case.operation,
                "case": case.label,
                "relative_error": error,
                "moved_bytes": case.traffic.moved,
                "measured_ms": round(1000 * seconds, 4),
                "modelled_ms": round(1000 * case.traffic.moved / (REACHED * peak), 4),
                "achieved_gb_s": round(case.traffic.moved / seconds / 1e9, 1),
                "share_of_peak": round(case.traffic.moved / seconds / peak, 3),
            }
        )
    return {
        "device": device,
        "triton": version("triton"),
        "peak_gb_s": round(peak / 1e9),
        "peak_is": "a measured copy" if peak == copied else "published",
        "copied_gb_s": round(copied / 1e9),
        "rows": rows,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=160).print(table)


def dry() -> None:
    """Check every operation in Triton's interpreter on tiny shapes."""
    for dtype in ALLOWED:
        for case in cases([Setup(TINY, 70, dtype, torch.device("cpu"))]):
            print(f"{case.operation} {case.label} {dtype}: relative error {check(case, dtype):.1e}")


def main() -> None:
    """Measure on a GPU, or check without one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=[str(dtype).removeprefix("torch.") for dtype in ALLOWED])
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--dry", action="store_true", help="check in the interpreter, without a GPU")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        dry()
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU: nothing to measure; --dry checks the kernels without one")
    dtype = getattr(torch, arguments.dtype)
    contexts = [int(text) for text in arguments.contexts.split(",")]
    setups = [Setup(model, context, dtype, torch.device("cuda")) for model in MODELS for context in contexts]
    found = measure(setups, dtype)
    print(f"{found['device']}: peak {found['peak_gb_s']} GB/s ({found['peak_is']}), copy {found['copied_gb_s']} GB/s")
    show(found["rows"])
    if arguments.out:
        save(arguments.out, {"dtype": arguments.dtype, **found})


if __name__ == "__main__":
    main()
