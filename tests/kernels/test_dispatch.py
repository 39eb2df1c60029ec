"""Which implementation runs, why, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import new_model
from thinkkv import sdk
from thinkkv.kernels import dispatch
from thinkkv.kernels.dispatch import OPERATIONS, Choice, KernelError, choose, operation


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THINKKV_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_gpu_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    assert choose("cuda").backend == "triton"


def test_a_cpu_runs_the_kernel_in_c_where_a_compiler_is() -> None:
    assert choose("cpu") == Choice("native", "cpu tensors, a C compiler made the kernels for this processor")


def test_a_cpu_without_a_compiler_runs_torch_and_says_how_to_get_faster(tmp_path: Path) -> None:
    script = """
from thinkkv.kernels.dispatch import choose, row_operations
print(choose("cpu").backend, choose("cpu").reason)
row_operations("cpu"), row_operations("cpu", traced=True)
import os; os.environ["THINKKV_KERNELS"] = "native"
try: choose("cpu")
except Exception as error: print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    chosen, refused = done.stdout.splitlines()
    assert chosen.startswith("torch cpu tensors; no C compiler found")
    assert "install gcc or clang" in chosen
    assert refused.startswith("THINKKV_KERNELS=native, but no C compiler found")


def test_a_gpu_without_triton_runs_torch_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    choice = choose("cuda")
    assert choice.backend == "torch"
    assert "pip install 'thinkkv[gpu]'" in choice.reason


@pytest.mark.parametrize("forced", ["torch", "reference"])
def test_the_environment_forces_one(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINKKV_KERNELS", forced)
    for device in ("cpu", "cuda"):
        assert choose(device) == Choice(forced, f"THINKKV_KERNELS={forced}")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("forced", "found", "message"),
    [
        ("cuda", object(), "THINKKV_KERNELS=cuda is unknown - use auto, torch, native, triton, reference"),
        ("triton", None, "triton is not installed - pip install 'thinkkv[gpu]'"),
        ("triton", object(), "the tensors are on cpu - unset it, or interpret: TRITON_INTERPRET=1"),
    ],
    ids=["unknown", "not-installed", "no-gpu"],
)
def test_what_cannot_run_is_said_before_any_work(
    forced: str, found: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THINKKV_KERNELS", forced)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: found)
    with pytest.raises(KernelError, match=message.replace("[", r"\[")):
        choose("cpu")
    with pytest.raises(sdk.ThinkKVError, match=message.replace("[", r"\[")):
        sdk.apply(new_model("llama", 2))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_every_implementation(name: dispatch.Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("torch", "native", "reference"):
        monkeypatch.setenv("THINKKV_KERNELS", backend)
        assert callable(operation(name, "cpu"))


def test_triton_is_not_imported_for_a_cpu() -> None:
    script = (
        "import sys; from thinkkv.kernels.dispatch import OPERATIONS, operation; "
        "[operation(name, 'cpu') for name in OPERATIONS]; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
