"""Export: write a baked model in one format, verify it, and only then put it in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thinkkv.export.bake import Baked
from thinkkv.export.onnx.builder import Quantize
from thinkkv.export.onnx.options import OnnxOptions
from thinkkv.export.staging import staged, write_json
from thinkkv.export.verification import NOT_RUN, Verified, verify_checkpoint, verify_gguf, verify_onnx
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.block import BLOCK_FILE
from thinkkv.sdk.manifest import BundleFile, read_manifest

Format = Literal["safetensors", "onnx", "gguf"]
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        format: of the files.
        folder: where they are.
        files: with hashes.
        verified: what was checked.
    """

    format: Format
    folder: Path
    files: list[BundleFile]
    verified: Verified

    def as_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            "format": self.format,
            "folder": str(self.folder),
            "files": [vars(file) for file in self.files],
            "verified": vars(self.verified),
        }


def export(
    baked: Baked,
    target: Path,
    *,
    format: Format,
    quantize: Quantize = "none",
    onnx: OnnxOptions | None = None,
    force: bool = False,
    verify: bool = True,
) -> Exported:
    """Write, verify, rename.

    Args:
        baked: what ``bake`` returned.
        target: the folder to be.
        format: what to write.
        quantize: weight-only quantization of ONNX and GGUF.
        onnx: further options of an ONNX bundle; only one for the CPU can be verified.
        force: replace an existing folder.
        verify: compare greedy tokens with PyTorch before the folder is put in place.

    Raises:
        ExportError: it cannot be written, or it differs from PyTorch.
        MissingExtraError: the format's packages are not installed.
    """
    if format == "safetensors" and quantize != "none":
        raise ExportError("safetensors checkpoints are not quantized - drop --quantize, or use --format onnx or gguf")
    onnx = onnx or OnnxOptions()
    onnx.check_format(format)
    with staged(target, needs=_needed_bytes(baked, format), force=force) as folder:
        verified = _write(baked, folder, format, quantize, onnx, verify)
        rounded = quantize != "none" or onnx.half
        if verified.greedy_tokens_equal is False and not rounded:
            raise ExportError(
                f"the {format} export generates other tokens than {verified.against} - nothing was kept; please report "
                "the model and the versions from `thinkkv doctor`, or look at it with --no-verify"
            )
    return Exported(format, target, read_manifest(target), verified)


def _write(baked: Baked, folder: Path, format: Format, quantize: Quantize, onnx: OnnxOptions, verify: bool) -> Verified:
    if format == "safetensors":
        from thinkkv.export.safetensors import write_checkpoint

        write_checkpoint(baked, folder)
        return verify_checkpoint(baked, folder) if verify else NOT_RUN
    if format == "gguf":
        from thinkkv.export.gguf import write_gguf

        write_gguf(baked, folder / GGUF_FILE, quantize=quantize)
        write_json(folder / BLOCK_FILE, baked.block.as_json())
        return verify_gguf(baked, folder / GGUF_FILE) if verify else NOT_RUN
    from thinkkv.export.onnx.write import write_onnx

    write_onnx(baked, folder, quantize=quantize, options=onnx)
    return verify_onnx(baked, folder, native=onnx.native) if verify and onnx.on_cpu else NOT_RUN


def _needed_bytes(baked: Baked, format: Format) -> int:
    """An upper bound: the weights once, and for ONNX the checkpoint that the builder reads beside its result."""
    parameters = sum(parameter.numel() for parameter in baked.model.parameters())
    checkpoint = sum(parameter.numel() * parameter.element_size() for parameter in baked.model.parameters())
    written = {"safetensors": checkpoint, "gguf": 2 * parameters, "onnx": checkpoint + 4 * parameters}[format]
    return written + 64 * 2**20
