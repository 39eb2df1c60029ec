"""A linear layer, in plain torch."""

from __future__ import annotations

import torch


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``inputs @ weight.T + bias``.

    Args:
        inputs: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of ``inputs``.
    """
    return torch.nn.functional.linear(inputs, weight, bias)
