"""Greedy continuations, and policies small enough to evict tokens of the prompts of tiny models."""

from __future__ import annotations

from typing import Any

import torch

from thinkkv.sdk.policies import EvidenceKV, RehearsedKV, TaskKV

SMALL_TASK_KV = TaskKV(sinks=2, recent=8, observation_window=4, top=16)
SMALL_EVIDENCE_KV = EvidenceKV(
    head_scores=((0.7, 0.3), (0.9, 0.5), (0.4, 1.0)), sinks=2, recent=4, observation_window=3, pooling=3
)
SMALL_REHEARSED_KV = RehearsedKV(head_scores=((0.7, 0.3), (0.9, 0.5), (0.4, 1.0)), sinks=2, recent=3, whole=26)


def greedy(model: Any, ids: torch.Tensor, steps: int = 8, **options: Any) -> list[list[int]]:
    """New tokens of a greedy continuation."""
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **options)[:, ids.shape[1] :].tolist()
