"""Compile every kernel ahead of time, without a GPU, and tabulate what the compiler made of it.

    python -m thinkkv.kernels.compile_report [--out benchmarks/results/kernels] [--targets sm_80,sm_90] [--only TEXT]

Exits with 1 where a kernel spills, does not fit the chip, or reads its streams by less than 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import platform
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from thinkkv import kernels
from thinkkv.kernels.chips import CHIPS, Chip
from thinkkv.kernels.variant import Variant

WIDE = 16
"""Bytes of the widest load instruction of all targets."""

NVIDIA_MATRIX = r"(mma\.sync|wgmma\.mma_async)[\w.]*?\.(m\d+n\d+k\d+)[\w.]*?\.(\w+)\.\w+\s"
AMD_MATRIX = r"\b(v_mfma)_\w+?_(\d+x\d+x\d+)\w*?_(f32|f16|bf16)\b"

DWORDS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "ubyte": 1, "sbyte": 1}


def operations() -> list[str]:
    """Folders of thinkkv.kernels that have a triton.py."""
    folders = (module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)
    return sorted(name for name in folders if find_spec(f"{kernels.__name__}.{name}.triton"))


def all_variants() -> list[Variant]:
    """Variants of every operation."""
    modules = (importlib.import_module(f"{kernels.__name__}.{name}.triton") for name in operations())
    return [variant for module in modules for variant in module.variants()]


def digest(variant: Variant) -> str:
    """Hash of all that decides the compiled code, besides Triton: sources and configuration."""
    text = "\n".join(_sources(variant.kernel.fn, {}).values())
    configuration = [
        dict(variant.signature),
        dict(variant.constexprs),
        sorted(variant.divisible),
        variant.num_warps,
        variant.num_stages,
    ]
    return hashlib.sha256((text + json.dumps(configuration)).encode()).hexdigest()[:12]


def _sources(function: Any, found: dict[str, str]) -> dict[str, str]:
    """Source of a kernel and of the kernels that it calls, by name."""
    found[function.__name__] = inspect.getsource(function)
    called = (getattr(function.__globals__.get(name), "fn", None) for name in function.__code__.co_names)
    for callee in called:
        if callee is not None and callee.__name__ not in found:
            _sources(callee, found)
    return found


def compiled(variant: Variant, chip: Chip) -> Any:
    """Triton's result for one variant: ``asm`` by language, ``metadata``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    order = list(variant.signature)
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp_size), options=options)


def compile_variant(variant: Variant, chip: Chip) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    result = compiled(variant, chip)
    seconds = time.perf_counter() - start
    read = read_nvidia if chip.backend == "cuda" else read_amd
    code = read(result.asm)
    loads: Mapping[int, int] = code.pop("loads")
    fit = {"registers": code["registers"], "shared": result.metadata.shared, "num_warps": variant.num_warps}
    row = {
        "operation": variant.operation,
        "variant": variant.name,
        "target": chip.target,
        **code,
        "shared_bytes": result.metadata.shared,
        "widest_load_bytes": max(loads, default=0),
        "wide_load_share": round(loads[WIDE] * WIDE / max(sum(size * count for size, count in loads.items()), 1), 2),
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "blocks_per_multiprocessor": chip.resident_blocks(**fit),
        "occupancy": round(chip.occupancy(**fit), 3),
        "compile_seconds": round(seconds, 2),
        "digest": digest(variant),
    }
    return {**row, "faults": faults(row, streams=variant.streams)}


def faults(row: Mapping[str, Any], *, streams: bool) -> list[str]:
    """What is wrong with a compiled kernel; K and V have to come in 16-byte loads where they are streamed."""
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if not row["blocks_per_multiprocessor"]:
        found.append("does not fit")
    if streams and row["wide_load_share"] <= 0.5:
        found.append(f"{row['wide_load_share']:.0%} of the loaded bytes in 16-byte loads")
    return found


def read_nvidia(asm: Mapping[str, Any]) -> dict[str, Any]:
    """Registers and spilled bytes from the binary, matrix instructions and loads from PTX.

    Spills are the bytes of a thread's stack: a kernel without arrays of its own has no other use for it.
    """
    usage = _cuobjdump(asm["cubin"])
    ptx = asm["ptx"]
    loads: Counter[int] = Counter()
    for vector, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx):
        loads[int(size, 0)] += 1
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "matrix": _counted(re.findall(NVIDIA_MATRIX, ptx)),
        "loads": loads,
    }


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)
    return {name: int(value) for name, value in usage}


def read_amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    """The same from the assembly and its meta-data; spills are registers, vector and scalar ones."""
    text = asm["amdgcn"]
    noted = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
    loads = Counter(DWORDS[kind] for kind in re.findall(r"\b(?:global|buffer)_load_([a-z0-9]+)", text))
    return {
        "registers": noted["vgpr_count"],
        "spills": noted["vgpr_spill_count"] + noted["sgpr_spill_count"],
        "matrix": _counted(re.findall(AMD_MATRIX, text)),
        "loads": loads,
    }


def _counted(found: Sequence[tuple[str, str, str]]) -> str:
    """Matrix instructions as text: kind, shape, operand type, how often."""
    return ", ".join(f"{' '.join(parts)} x{count}" for parts, count in sorted(Counter(found).items()))


def compile_all(variants: Sequence[Variant], chips: Sequence[Chip]) -> Iterator[dict[str, Any]]:
    """Rows of all variants on all chips, from an empty compiler cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for variant in variants:
            for chip in chips:
                yield compile_variant(variant, chip)


def provenance() -> dict[str, Any]:
    """Versions and commit of the compiled sources."""
    run = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("triton", "thinkkv")}},
        "commit": commit or "unknown",
    }


COLUMNS = {
    "variant": "variant",
    "target": "target",
    "registers": "registers",
    "spills": "spills",
    "shared_bytes": "shared, bytes",
    "matrix": "matrix instructions",
    "widest_load_bytes": "widest load, bytes",
    "wide_load_share": "16-byte share",
    "num_warps": "warps",
    "blocks_per_multiprocessor": "blocks per SM",
    "occupancy": "occupancy",
    "compile_seconds": "compile, s",
}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page with a table per operation."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        f"Written by `{report['command']}` ({versions}; commit {report['commit']}). Nothing here was run on a GPU.",
        "",
        "- registers: vector registers of a thread, from the binary (NVIDIA) or the assembly's meta-data (AMD).",
        "- spills: bytes of stack of a thread (NVIDIA), spilled vector and scalar registers (AMD).",
        "- matrix instructions: how often each stands in the code; exact float32 has none on NVIDIA (FMA).",
        "- 16-byte share: of the bytes that the code's load instructions name, those named by 16-byte loads.",
        "- occupancy: blocks per SM x warps / resident warps, where blocks per SM is the least of the block limit,",
        "  `min(warp limit, schedulers x floor(registers per lane / registers rounded up to 8)) / warps` and",
        "  `shared memory / (shared + reserved)`. Limits:",
        *(
            f"  {chip.name} ({chip.target}): {chip.warps} warps, {chip.blocks} blocks, {chip.quarters} x "
            f"{chip.registers} registers per lane, {chip.shared // 1024} KiB shared, {chip.reserved} bytes reserved."
            for chip in CHIPS
        ),
    ]
    for operation in sorted({row["operation"] for row in report["rows"]}):
        lines += ["", f"## {operation}", "", _cells(COLUMNS.values()), _cells("---" for _ in COLUMNS)]
        mine = (row for row in report["rows"] if row["operation"] == operation)
        lines += [_cells(str(row[column]) for column in COLUMNS) for row in mine]
    return "\n".join(lines) + "\n"


def _cells(texts: Any) -> str:
    return f"| {' | '.join(texts)} |"


def main() -> None:
    """Compile, write the tables and exit with 1 where something is wrong."""
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(
        prog="python -m thinkkv.kernels.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="writes OUT.md and OUT.json")
    parser.add_argument("--targets", default=",".join(chip.target for chip in CHIPS))
    parser.add_argument("--only", default="", help='regular expression for "operation variant"')
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    console = Console(stderr=True)
    chips = [chip for chip in CHIPS if chip.target in arguments.targets.split(",")]
    variants = [v for v in all_variants() if re.search(arguments.only, f"{v.operation} {v.name}")]
    rows = list(track(compile_all(variants, chips), "compiling", len(variants) * len(chips), console=console))
    if arguments.out:
        command = "python -m thinkkv.kernels.compile_report"
        report = {**provenance(), "command": command, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(markdown(report))
    wrong = [row for row in rows if row["faults"]]
    for row in wrong:
        console.print(f"{row['operation']} {row['variant']} {row['target']}: {'; '.join(row['faults'])}", style="red")
    console.print(f"{len(rows)} compiled, {len(wrong)} with faults")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
