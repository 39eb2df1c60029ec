"""The operators of ``ai.thinkkv`` in C for ONNX Runtime: optional, and made by the compiler of the machine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from thinkkv.patches.errors import ExportError
from thinkkv.sdk.block import LayerClasses

LIBRARY_FILE = "libthinkkv.so"
"""In a bundle that brings its own."""


def check_native(layers: Sequence[LayerClasses]) -> None:
    """Raise ExportError unless the operators in C serve these layers."""
    from thinkkv.kernels.decode_sizes import serves

    if all(layer.full == layer.kv_heads for layer in layers):
        raise ExportError("native operators serve bounded caches, and here every head keeps everything - drop --native")
    for layer in layers:
        if not serves(layer.query_heads // layer.kv_heads, layer.head_dim):
            raise ExportError(
                f"native operators do not serve {layer.query_heads} query heads for {layer.kv_heads} KV heads of "
                f"{layer.head_dim} dimensions - drop --native"
            )


def library_of(folder: Path) -> Path:
    """A bundle's own library, or one compiled for this processor where the bundle has none.

    Raises:
        ExportError: it has none, and none can be compiled here.
    """
    own = folder / LIBRARY_FILE
    return own if own.is_file() else _compiled()


def write_library(folder: Path) -> None:
    """Put a library for this processor into a bundle.

    Raises:
        ExportError: it cannot be compiled here.
    """
    shutil.copyfile(_compiled(), folder / LIBRARY_FILE)


def _compiled() -> Path:
    from thinkkv.kernels.c_library import NoKernelError
    from thinkkv.kernels.task_kv_step import library

    try:
        return library()
    except NoKernelError as error:
        raise ExportError(f"the native operators cannot be compiled: {error} - or leave --native out") from error
