"""What the compiled attention does that the interpreter can't show: matrix instructions and asynchronous copies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install triton")

COMPILE = """
import sys
from thinkkv.kernels.chips import A100
from thinkkv.kernels.compile_report import compiled
from thinkkv.kernels.ragged_decode.triton import variants

variant = {variant.name: variant for variant in variants()}[sys.argv[1]]
sys.stdout.write(compiled(variant, A100).asm["ptx"])
"""


def ptx(name: str, cache: Path) -> str:
    """PTX for compute capability 8.0, from a process in which kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, name]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("dtype", "products"),
    [("fp16", {"f32.f16.f16.f32"}), ("bf16", {"f32.bf16.bf16.f32"}), ("fp32", set())],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_halves_multiply_on_matrix_units_and_float32_exactly(dtype: str, products: set[str], tmp_path: Path) -> None:
    code = ptx(f"split {dtype} D128 G7->16", tmp_path)
    assert set(re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.([\w.]+)", code)) == products
    assert ("mma" in code) == bool(products)
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], (\w+)", code)
    assert set(copies) == {"0x10"}
