"""Run onnxruntime-genai's own model builder: the graph of the dense model, in any precision that it knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from thinkkv.export.onnx.options import EXTRA_OPTIONS, OnnxOptions
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.extras import require

Quantize = Literal["none", "int8", "int4"]


def check_installed() -> None:
    """Raise MissingExtraError unless the ``export`` extra is there."""
    require(("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"), extra="export", purpose="ONNX export")


def build_dense(checkpoint: Path, target: Path, *, quantize: Quantize, options: OnnxOptions) -> None:
    """Build the dense model's bundle: graph, data file, ``genai_config.json``, tokenizer.

    Args:
        checkpoint: a Hugging Face folder.
        target: where the files go.
        quantize: weight-only quantization.
        options: what the bundle is for.

    Raises:
        ExportError: the builder failed.
    """
    full = "fp32" if options.on_cpu else "fp16"
    precision = full if quantize == "none" else quantize
    # In a process of its own: the builder prints, changes sys.path and leaves the weights in memory.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("--input", str(checkpoint), "--output", str(target)),
            *("--precision", precision, "--execution_provider", options.provider),
            *("--cache_dir", str(target / ".cache"), "--extra_options", *EXTRA_OPTIONS, *options.builder_options),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise ExportError(
            f"onnxruntime-genai's model builder failed ({last.strip()[:200]}) - check that it supports this "
            "architecture, or use --format safetensors"
        )
    shutil.rmtree(target / ".cache", ignore_errors=True)
