"""Which implementation of an operation runs: Triton on a GPU, torch and C on a CPU, or what the environment says.

Nothing is imported before it is needed; Triton never is where torch runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from thinkkv.kernels.c_library import NoKernelError

VARIABLE = "THINKKV_KERNELS"
"""Environment variable that forces an implementation."""

Backend = Literal["torch", "native", "triton", "reference"]
Operation = Literal["window_scores", "semantic_vector", "compact", "append", "ragged_decode", "linear"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)

OWN_OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "native": ("append", "ragged_decode", "linear"),
    "triton": ("window_scores", "semantic_vector", "compact", "append", "ragged_decode"),
}
"""What has a kernel; the others are plain torch there."""

ROW_OPERATIONS: tuple[Operation, ...] = ("compact", "append", "ragged_decode")
"""Operations on a layer's arena; the others take dense tensors."""


class KernelError(RuntimeError):
    """The implementation that was asked for cannot run here."""


@dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Args:
        backend: ``triton``; ``torch``; ``native``, which is torch with kernels in C for decoding; or the ``reference``
            that all are tested against.
        reason: in a few words.
    """

    backend: Backend
    reason: str


def choose(device: torch.device | str) -> Choice:
    """The implementation for tensors on a device.

    Raises:
        KernelError: the environment forces what is unknown or cannot run.
    """
    kind = torch.device(device).type
    forced = os.environ.get(VARIABLE, "auto")
    if forced == "auto":
        if kind == "cpu":
            return _choose_for_cpu()
        if kind != "cuda":
            return Choice("torch", f"{kind} tensors: Triton runs on CUDA and ROCm only")
        if find_spec("triton") is None:
            return Choice("torch", "triton is not installed, which would be faster: pip install 'thinkkv[gpu]'")
        return Choice("triton", "CUDA or ROCm tensors, triton is installed")
    if forced not in get_args(Backend):
        raise KernelError(f"{VARIABLE}={forced} is unknown - use auto, {', '.join(get_args(Backend))}")
    if forced == "triton":
        _check_triton(kind)
    if forced == "native":
        _check_native(kind)
    return Choice(forced, f"{VARIABLE}={forced}")  # type: ignore[arg-type]


def _check_triton(kind: str) -> None:
    if find_spec("triton") is None:
        raise KernelError(f"{VARIABLE}=triton, but triton is not installed - pip install 'thinkkv[gpu]'")
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f"{VARIABLE}=triton, but the tensors are on {kind} - unset it, or interpret: TRITON_INTERPRET=1"
        )


def choose_for(name: Operation, device: torch.device | str) -> Choice:
    """The implementation of one operation; raises as ``choose``."""
    choice = choose(device)
    return choice if _has_kernel(name, choice.backend) else Choice("torch", "plain torch serves")


def _has_kernel(name: Operation, backend: Backend) -> bool:
    return name in OWN_OPERATIONS.get(backend, OPERATIONS)


def _choose_for_cpu() -> Choice:
    missing = _missing_for_native()
    if missing:
        return Choice("torch", f"cpu tensors; {missing}")
    return Choice("native", "cpu tensors, a C compiler made the kernels for this processor")


def _check_native(kind: str) -> None:
    if kind != "cpu":
        raise KernelError(f"{VARIABLE}=native, but the tensors are on {kind} - unset it")
    missing = _missing_for_native()
    if missing:
        raise KernelError(f"{VARIABLE}=native, but {missing} - unset it, or use torch")


@cache
def _missing_for_native() -> str | None:
    """Why there is no kernel in C; None where there is one. The first call of all may compile it."""
    try:
        importlib.import_module("thinkkv.kernels.native")
    except NoKernelError as error:
        return str(error)
    return None


def operation(name: Operation, device: torch.device | str) -> Callable[..., Any]:
    """The function that does an operation for tensors on a device."""
    return _load(name, choose(device).backend)


@dataclass(frozen=True)
class RowOperations:
    """What is done to an arena, with the signatures of ``thinkkv.kernels.grouped``.

    Args:
        compact, append, ragged_decode: the operations.
        counting: whether ``append`` also counts ``arena.lengths``.
    """

    compact: Callable[..., None]
    append: Callable[..., None]
    ragged_decode: Callable[..., torch.Tensor]
    counting: bool


def row_operations(device: torch.device | str, *, traced: bool = False) -> RowOperations:
    """The operations on an arena on a device.

    Args:
        device: where the arena is.
        traced: for a step that is compiled once and run many times: lengths are read and counted on the device only.
    """
    backend = choose(device).backend
    compact, append, ragged_decode = (_load(name, backend) for name in ROW_OPERATIONS)
    if traced and backend == "torch":
        append, ragged_decode = (_function("traced", name) for name in ("append", "ragged_decode"))
    return RowOperations(compact, append, ragged_decode, counting=traced or backend != "torch")


@cache
def _load(name: Operation, backend: Backend) -> Callable[..., Any]:
    if not _has_kernel(name, backend):
        backend = "torch"
    if name in ROW_OPERATIONS and backend in ("torch", "native"):
        return _function("native" if backend == "native" else "grouped", name)
    module = "reference" if backend == "torch" else backend
    kernel = _function(f"{name}.{module}", name)
    return partial(_function("ragged", name), kernel=kernel) if name in ROW_OPERATIONS else kernel


def _function(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(f"thinkkv.kernels.{module}"), name)
    return found
