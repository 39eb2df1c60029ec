"""Run onnxruntime-genai's own model builder: the graph of the dense model, in any precision that it knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from thinkkv.patches.errors import ExportError
from thinkkv.sdk.extras import require

Quantize = Literal["none", "int8", "int4"]
CacheDtype = Literal["float32", "float16"]
Provider = Literal["cpu", "cuda", "webgpu"]

EXTRA_OPTIONS = (
    "prune_lm_head=true",  # a prompt's logits but the last would take gigabytes: tokens x vocabulary
    "fuse_qk_norm_gqa=false",  # normalised inside the attention node, queries could not be given to another one
    "fuse_mlp_gate_up=true",  # one product instead of two: the same numbers, sooner
)


def check_installed() -> None:
    """Raise MissingExtraError unless the ``export`` extra is there."""
    require(("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"), extra="export", purpose="ONNX export")


def check_options(options: Sequence[str]) -> None:
    """Raise ExportError unless these are ``KEY=VALUE`` pairs that the rewrite of the graph leaves open."""
    fixed = {option.partition("=")[0] for option in EXTRA_OPTIONS}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals and value):
            raise ExportError(f"{option!r} is no builder option - write it as KEY=VALUE")
        if key in fixed:
            raise ExportError(f"{key} is fixed: a bundle's graph depends on it - leave it out")


def build_dense(
    checkpoint: Path,
    target: Path,
    *,
    quantize: Quantize = "none",
    provider: Provider = "cpu",
    options: Sequence[str] = (),
) -> None:
    """Build the dense model's bundle: graph, data file, ``genai_config.json``, tokenizer.

    Args:
        checkpoint: a Hugging Face folder.
        target: where the files go.
        quantize: weight-only quantization.
        provider: execution provider that the graph is for.
        options: further ``KEY=VALUE`` pairs for the builder's ``--extra_options``.

    Raises:
        ExportError: an option is none or fixed, or the builder failed.
    """
    check_options(options)
    full = "fp32" if provider == "cpu" else "fp16"
    precision = full if quantize == "none" else quantize
    # In a process of its own: the builder prints, changes sys.path and leaves the weights in memory.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("--input", str(checkpoint), "--output", str(target)),
            *("--precision", precision, "--execution_provider", provider),
            *("--cache_dir", str(target / ".cache"), "--extra_options", *EXTRA_OPTIONS, *options),
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
