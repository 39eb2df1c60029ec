"""The operators ``ai.thinkkv::TaskKVStep`` and ``StepCursor`` in C, for ONNX Runtime on a CPU: see README.md."""

from __future__ import annotations

from pathlib import Path

from thinkkv.kernels.c_library import compiled


def library() -> Path:
    """A library to register with ONNX Runtime, compiled for this processor where that has not been done.

    Raises:
        NoKernelError: there is no compiler, or it fails.
    """
    return compiled(Path(__file__).with_name("native.c"))
