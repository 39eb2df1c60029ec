"""When logits count as equal: the root mean square of the difference, relative to the expected logits'."""

from __future__ import annotations

import torch

RMS = {torch.float32: 1e-5, torch.bfloat16: 6e-2}
"""Largest relative error by the dtype of the tested model, against a float32 reference.

In bfloat16 the stock models themselves are 1.3e-2 (Llama) to 3e-2 (Qwen3) away from their float32 twins, under a mask
that leaves some heads a handful of tokens 4.9e-2 (Qwen3); a lost token moves the logits by 0.1 to 1.
"""


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|, over everything."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def assert_close(found: torch.Tensor, expected: torch.Tensor, *, rms: float) -> None:
    assert found.shape == expected.shape
    error = relative_rms(found, expected)
    assert error <= rms, f"relative rms error {error:.2e}, allowed {rms:.0e}"  # a NaN fails too
