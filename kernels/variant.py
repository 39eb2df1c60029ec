"""What the ahead-of-time report compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

SMALL_FORMS = {"i8": " int8", "u8": " k8v4", "i16": " k8v5"}
"""How forms that store small entries are called, by the dtype of the entries of values."""

STORED = {"i8": torch.int8, "u8": torch.uint8, "i16": torch.int16}
"""These dtypes in torch."""


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Args:
        operation: name of the operation's folder.
        name: readable: "split fp16 D128 G7".
        kernel: the @triton.jit function.
        signature: argument -> "*fp16" | "i32" | "i64" | "fp32" | "constexpr".
        constexprs: values of the constexpr arguments.
        divisible: arguments that are multiples of 16.
        num_warps, num_stages: launch configuration.
        streams: whether wide (16-byte) loads of K and V are expected.
    """

    operation: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int
    streams: bool
