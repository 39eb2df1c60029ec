"""The GPU benchmark where there is no GPU: its checks run interpreted, its measurement says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thinkkv.kernels.compile_report import operations

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_decode.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "torch finds no GPU: nothing to measure; --dry checks the kernels without one\n"


def test_a_dry_run_checks_every_operation() -> None:
    done = run("--dry")
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(operations())
