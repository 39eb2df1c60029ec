"""Compiled code, without a GPU: no spills, 16-byte loads, and a committed table of all of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thinkkv.kernels import compile_report
from thinkkv.kernels.chips import A100, CHIPS, H100, MI300X, Chip

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "kernels.json"
REFRESH = "python -m thinkkv.kernels.compile_report --out benchmarks/results/kernels"

COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
"""Environment of a process that compiles: kernels decorated for the interpreter cannot be."""

BROKEN = """
import dataclasses, json
from thinkkv.kernels.chips import A100
from thinkkv.kernels.compile_report import compile_all
from thinkkv.kernels.window_scores.triton import variants

found = {variant.name: variant for variant in variants()}
half, full = found["sums fp16 D128 L32"], found["sums fp32 D128 L32"]
unaligned = dataclasses.replace(half, divisible=frozenset())
crowded = dataclasses.replace(full, num_warps=4)
huge = dataclasses.replace(half, constexprs={**half.constexprs, "BLOCK_N": 1024}, num_warps=16)
print(json.dumps([row["faults"] for row in compile_all([half, unaligned, crowded, huge], [A100])]))
"""


def test_representative_kernels_have_no_faults(tmp_path: Path) -> None:
    only = r"(sums|means) (fp16 D128|bf16 D80|fp32 D256) L32|merge L32|gather bf16 D80|D128 G4"
    command = [sys.executable, "-m", "thinkkv.kernels.compile_report", "--targets", "sm_90", "--only", only]
    done = subprocess.run(
        [*command, "--out", tmp_path / "kernels"], capture_output=True, text=True, env=COMPILED, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_90"}
    assert all(row["spills"] == 0 for row in rows)
    by_name = {row["variant"]: row for row in rows}
    assert len(by_name) >= 8
    assert by_name["sums fp16 D128 L32"]["matrix"].startswith("wgmma.mma_async m64n32k16 f16")
    assert by_name["means bf16 D80 L32"]["matrix"].startswith("wgmma.mma_async m64n32k16 bf16")
    assert by_name["sums fp16 D128 L32"]["widest_load_bytes"] == 16
    assert "wgmma.mma_async m64n32k16 f16" in (tmp_path / "kernels.md").read_text()


def test_broken_kernels_are_noticed() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, env=COMPILED, check=True)
    sound, unaligned, crowded, huge = json.loads(done.stdout)
    assert sound == []
    assert [re.sub(r"\d+", "#", text) for text in unaligned] == ["#% of the loaded bytes in #-byte loads"]
    assert crowded[0].startswith("spills")
    assert "does not fit" in huge


def test_the_interpreter_is_refused() -> None:
    command = [sys.executable, "-m", "thinkkv.kernels.compile_report"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == "TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it\n"


def test_the_committed_table_covers_every_variant_as_it_is_now() -> None:
    rows = json.loads(COMMITTED.read_text())["rows"]
    found = {(row["operation"], row["variant"], row["target"]): row["digest"] for row in rows}
    variants = compile_report.all_variants()
    expected = {(v.operation, v.name, c.target): compile_report.digest(v) for v in variants for c in CHIPS}
    assert found == expected, f"refresh with: {REFRESH}"
    assert len(rows) == len(variants) * len(CHIPS), "two variants of one name"


def test_the_committed_table_has_no_faults() -> None:
    report = json.loads(COMMITTED.read_text())
    assert [row for row in report["rows"] if row["faults"]] == []
    assert COMMITTED.with_suffix(".md").read_text() == compile_report.markdown(report), f"refresh with: {REFRESH}"


def test_the_committed_table_is_of_the_pinned_triton() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert json.loads(COMMITTED.read_text())["versions"]["triton"] == pins["triton"], f"refresh with: {REFRESH}"


def test_half_types_use_their_own_matrix_instructions() -> None:
    rows = json.loads(COMMITTED.read_text())["rows"]
    for row in rows:
        dtype = re.search(r"\b(fp|bf)16\b", row["variant"])
        if row["operation"] == "window_scores" and dtype:
            kind = {"sm_80": "mma.sync", "sm_90": "wgmma", "gfx942": "v_mfma"}[row["target"]]
            assert row["matrix"].startswith(kind)
            assert f" {dtype.group().replace('fp', 'f')} " in row["matrix"]


# Blocks by hand. A100: 104 registers are 104 x 32 per warp, 16384 / 3328 = 4 warps per scheduler, 16 warps, 4 blocks of
# 4 warps; 41,472 + 1,024 bytes fit 167,936 three times. H100: 49,664 + 1,024 bytes fit 233,472 four times. MI300X:
# 138 registers round to 144, 512 / 144 = 3 waves per scheduler, 12 waves, 3 blocks; 32 KiB fit 64 KiB twice.
@pytest.mark.parametrize(
    ("chip", "registers", "shared", "num_warps", "blocks", "occupancy"),
    [
        (A100, 102, 41472, 4, 3, 12 / 64),
        (A100, 102, 0, 4, 4, 16 / 64),
        (A100, 32, 0, 1, 32, 32 / 64),
        (A100, 32, 163 * 1024, 4, 1, 4 / 64),
        (A100, 32, 163 * 1024 + 1, 4, 0, 0),
        (A100, 255, 0, 16, 0, 0),
        (H100, 90, 49664, 4, 4, 16 / 64),
        (MI300X, 138, 32768, 4, 2, 8 / 32),
        (MI300X, 138, 0, 4, 3, 12 / 32),
    ],
)
def test_occupancy_by_hand(
    chip: Chip, registers: int, shared: int, num_warps: int, blocks: int, occupancy: float
) -> None:
    fit = {"registers": registers, "shared": shared, "num_warps": num_warps}
    assert chip.resident_blocks(**fit) == blocks
    assert chip.occupancy(**fit) == occupancy
