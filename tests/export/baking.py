"""Models with uneven head profiles, for the export tests."""

from __future__ import annotations

from typing import Any

import torch

from thinkkv.patches.architecture import probe
from thinkkv.patches.registry import architecture_of
from thinkkv.sdk.policies import TaskKV
from thinkkv.sdk.profile import HeadProfile, fingerprint_of

SMALL = TaskKV(sinks=4, recent=8, observation_window=8, beta=0.5)
"""Task-KV at the scale of the tiny models: two of four KV heads full at the bottom, one at the top."""


def profile_of(model: Any, *, score: str = "distance", best_layer: int | None = None) -> HeadProfile:
    """A made-up profile of this model, in which every layer ranks its heads differently.

    Args:
        model: whose heads.
        score: kind of the scores.
        best_layer: where all heads score above those of the other layers.
    """
    shapes = probe(architecture_of(model.config), model)
    draw = torch.Generator().manual_seed(0)
    scores = tuple(
        tuple((torch.rand(shape.kv_heads, generator=draw) + (layer == best_layer)).tolist())
        for layer, shape in enumerate(shapes)
    )
    return HeadProfile(
        score=score,
        scores=scores,
        heterogeneous=tuple((max(range(len(row)), key=row.__getitem__),) for row in scores),
        fingerprint=fingerprint_of(model, shapes),
        calibration={"prompts": 0, "sha256": "made up"},
    )


def dense_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits
