"""The operators ``ai.thinkkv::TaskKVStep`` and ``StepCursor`` in C, for ONNX Runtime on a CPU: see README.md."""

from __future__ import annotations

from pathlib import Path

from thinkkv.kernels.c_library import compiled

LANES, MAX_GROUP, MAX_DIM = 8, 16, 256


def takes(group: int, dim: int) -> bool:
    """Whether the operator is made for so many query heads a KV head, and heads of such a size."""
    return group <= MAX_GROUP and dim <= MAX_DIM and dim % LANES == 0


def library() -> Path:
    """A library to register with ONNX Runtime, compiled for this processor where that has not been done.

    Raises:
        NoKernelError: there is no compiler, or it fails.
    """
    return compiled(Path(__file__).with_name("native.c"))
