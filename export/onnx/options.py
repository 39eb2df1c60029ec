"""What an ONNX bundle is written for, beyond the model and its head classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from thinkkv.patches.errors import ExportError

CacheDtype = Literal["float32", "float16"]
Provider = Literal["cpu", "cuda", "webgpu"]

EXTRA_OPTIONS = (
    "prune_lm_head=true",  # a prompt's logits but the last would take gigabytes: tokens x vocabulary
    "fuse_qk_norm_gqa=false",  # normalised inside the attention node, queries could not be given to another one
    "fuse_mlp_gate_up=true",  # one product instead of two: the same numbers, sooner
)


@dataclass(frozen=True)
class OnnxOptions:
    """Of one bundle.

    Args:
        provider: execution provider that the graph is for; other than ``cpu`` it is built and checked, not run.
        builder_options: further ``KEY=VALUE`` options of onnxruntime-genai's model builder.
        native: with operators in C for this processor, which onnxruntime-genai then loads.
        cache_dtype: of a native bundle's caches; None for the graph's float type.

    Raises:
        ExportError: they do not go together.
    """

    provider: Provider = "cpu"
    builder_options: tuple[str, ...] = ()
    native: bool = False
    cache_dtype: CacheDtype | None = None

    def __post_init__(self) -> None:
        _check_builder_options(self.builder_options)
        if self.native and not self.on_cpu:
            raise ExportError(f"native operators are for CPUs, not for {self.provider} - drop --native or --provider")
        if self.half and not self.native:
            raise ExportError(
                "stock ONNX Runtime would convert float16 caches whole in each step - add --native, or drop "
                "--cache-dtype"
            )

    @property
    def on_cpu(self) -> bool:
        """Whether the bundle runs on a CPU: what can be verified."""
        return self.provider == "cpu"

    @property
    def half(self) -> bool:
        """Whether caches are float16."""
        return self.cache_dtype == "float16"

    def check_format(self, format: str) -> None:
        """Raise ExportError where something here is set that another format has no use for."""
        if format == "onnx":
            return
        if self.builder_options:
            raise ExportError("builder options belong to ONNX - drop --builder-option, or use --format onnx")
        if self.native:
            raise ExportError(f"native operators belong to ONNX, not to {format} - drop --native")


def _check_builder_options(options: Sequence[str]) -> None:
    """Raise ExportError unless these are ``KEY=VALUE`` pairs that the rewrite of the graph leaves open."""
    fixed = {option.partition("=")[0] for option in EXTRA_OPTIONS}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals and value):
            raise ExportError(f"{option!r} is no builder option - write it as KEY=VALUE")
        if key in fixed:
            raise ExportError(f"{key} is fixed: a bundle's graph depends on it - leave it out")
