"""Greedy continuations, and a Task-KV small enough to evict tokens of the prompts of tiny models."""

from __future__ import annotations

from typing import Any

import torch

from thinkkv.sdk.policies import TaskKV

SMALL_TASK_KV = TaskKV(sinks=2, recent=8, observation_window=4, top=16)


def greedy(model: Any, ids: torch.Tensor, steps: int = 8, **options: Any) -> list[list[int]]:
    """New tokens of a greedy continuation."""
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **options)[:, ids.shape[1] :].tolist()
