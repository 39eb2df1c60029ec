"""Where kernels are tested, and how close to float64 they must come."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the kernels are interpreted."""

RMS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
"""Relative root mean square errors."""
